"""`report.md` of a run of `minillm train`, and the lines that the model's card takes from it."""

from collections.abc import Mapping, Sequence
from typing import Any

from minillm.evaluation.held_out import HeldOutScore
from minillm.experiments.memory import TrainingMemory
from minillm.experiments.reporting import amount, markdown_table, number
from minillm.publishing.cards import SUMMARY_HEADING


def memory_words(memory: TrainingMemory) -> str:
    """What a step holds, part by part."""
    optimizer = "unknown" if memory.optimizer is None else amount(memory.optimizer, "B")
    return (
        f"{amount(memory.weights, 'B')} of weights, {amount(memory.gradients, 'B')} of gradients, {optimizer} of the "
        f"optimizer, {amount(memory.activations, 'B')} of activations: {amount(memory.total, 'B')}"
    )


def flops_words(flops: float) -> str:
    """Floating-point operations with a prefix."""
    for size, prefix in ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M")):
        if flops >= size:
            return f"{number(flops / size)} {prefix}FLOP"
    return f"{flops:,.0f} FLOP"


def score_words(score: HeldOutScore, seed: int) -> str:
    """The held-out perplexity with its interval."""
    found, (low, high) = score.result, score.interval(seed)
    return (
        f"perplexity {found.perplexity:.2f} on {found.num_tokens:,} tokens of {len(score.losses):,} documents "
        f"(95 % interval {low:.2f} to {high:.2f})"
    )


def card_section(facts: Mapping[str, str]) -> str:
    """The part of a model card that says how the model was trained."""
    return "\n".join([SUMMARY_HEADING, "", *(f"- **{topic}**: {phrase}" for topic, phrase in facts.items())]) + "\n"


def report(
    facts: Mapping[str, str],
    groups: Sequence[Mapping[str, Any]],
    samples: Sequence[tuple[str, str]],
    picture: str | None,
) -> str:
    """The page of a run.

    Args:
        facts: topics and phrases, in order.
        groups: of `loss_by_frequency`.
        samples: prompts and what the model wrote.
        picture: the file of the curve; None without one.
    """
    lines = ["# Training run", "", *(f"- **{topic}**: {phrase}" for topic, phrase in facts.items()), ""]
    if picture is not None:
        lines += [f"![loss]({picture})", ""]
    rows = [
        (
            "never seen" if group["group"] == 0 else str(group["group"]),
            f"{group['ids']:,}",
            f"{group['tokens']:,}",
            f"{group['loss']:.3f}",
        )
        for group in groups
    ]
    lines += [
        "## Loss by frequency of the token",
        "",
        "Ids sorted by how often they occurred in training, commonest first, in tenths of all its tokens.",
        "",
        markdown_table(("tenth", "ids", "held-out tokens", "loss (nats)"), rows),
        "",
        "## Samples",
        "",
        "Greedy; prompts from the held-out text.",
        "",
    ]
    for prompt, text in samples:
        lines += ["```text", f"{plain(prompt)}⟶{plain(text)}", "```", ""]
    return "\n".join(lines)


def plain(text: str) -> str:
    """A text that does not end the block it stands in."""
    return text.replace("```", "'''")
