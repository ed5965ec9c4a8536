"""Makes the table of docs/families.md: python tests/family_table.py [--write].

A row per family: what makes it itself, read off its presets; what it is held to; the largest difference of logits.
"""

import argparse
import tempfile
from pathlib import Path

import torch
from native_families import CASES, VOCAB, native_model
from safetensors.torch import load_file
from transformers.utils import logging

from minillm import MiniLLMConfig
from minillm.configuration import PRESETS
from minillm.conversion import FAMILIES, load

PAGE = Path(__file__).parents[1] / "docs" / "families.md"
FIXTURES = Path(__file__).parent / "families"
MARKS = ("<!-- families -->\n", "<!-- end of families -->\n")
FIXTURES_OF = {
    "baichuan": ("baichuan-7b", "baichuan-13b"),
    "baichuan2": ("baichuan2-13b",),
    "glm-infilling": ("glm-10b",),
    "chatglm": ("chatglm-6b",),
    "chatglm2": ("chatglm2-6b",),
}
# Sizes, special tokens, and what only matters to fresh weights or training.
NOT_SHOWN = frozenset(
    "vocab_size hidden_size num_hidden_layers num_attention_heads num_key_value_heads head_dim intermediate_size "
    "max_position_embeddings position_table_size bos_token_id eos_token_id pad_token_id mask_token_id gmask_token_id "
    "smask_token_id sop_token_id initializer_range scale_residual_init use_cache attention_dropout hidden_dropout "
    "embedding_dropout deepnorm_alpha deepnorm_beta norm_eps rope_parameters alibi_scale".split()
)
WORDS = {
    "deepnorm_alpha": "`deepnorm_alpha` = sqrt(2 layers)",
    "alibi_scale": "`alibi_scale` = head_dim ** -0.5",
}


def presets_of(family):
    return {name: preset for name, preset in PRESETS.items() if preset.family == family}


def what_makes_it_itself(family):
    """Fields in which every preset of a family differs from the defaults, and those in which only some do."""
    presets = presets_of(family).values()
    defaults, shown = MiniLLMConfig(), []
    for name in MiniLLMConfig.__dataclass_fields__:
        values = [preset.fields.get(name) for preset in presets]
        if name in WORDS and all(values):
            shown.append(WORDS[name])
        if name == "rope_parameters":
            parts = {(value or {}).get("partial_rotary_factor", 1.0) for value in values} - {1.0}
            shown += [f"RoPE on {part:g} of each head" for part in parts]
        if name in NOT_SHOWN or not any(name in preset.fields for preset in presets):
            continue
        default = getattr(defaults, name)
        texts = [str(default if value is None else value) for value in values]
        shown.append(f"`{name}` {' or '.join(dict.fromkeys(texts))}")
    return ", ".join(shown) or "the defaults"


def largest_error(family):
    """The largest difference of float32 logits over the family's tiny checkpoints."""
    errors = []
    for name, (kind, _) in CASES.items():
        if kind == family:
            native = native_model(name)
            with tempfile.TemporaryDirectory() as folder:
                native.save_pretrained(folder)
                ours = load(folder, family=family).eval()
            ids = torch.randint(3, VOCAB, (3, 12), generator=torch.Generator().manual_seed(2))
            with torch.no_grad():
                errors.append((ours(ids).logits - native(ids).logits).abs().max().item())
    for fixture in FIXTURES_OF.get(family, ()):
        model, cases = load(FIXTURES / fixture).eval(), load_file(FIXTURES / fixture / "cases.safetensors")
        for key in [key.removesuffix(".logits") for key in cases if key.endswith(".logits")]:
            case = {name.partition(".")[2]: value for name, value in cases.items() if name.startswith(f"{key}.")}
            errors.append(fixture_error(model, case))
    return max(errors)


def fixture_error(model, case):
    """With the reference's own masks and positions; the tests make them from the token ids."""
    inputs, expected, kept = {}, case["logits"], torch.ones(case["input_ids"].shape, dtype=torch.bool)
    mask, positions = case.get("attention_mask"), case.get("position_ids")
    if mask is not None and mask.ndim == 2:
        inputs["attention_mask"], kept = mask, mask.bool()
    elif mask is not None:
        # ChatGLM marks what is hidden, GLM what is seen; the first token is seen by all.
        seen = mask.bool() == mask[:, :, :1, :1].bool()
        inputs["attention_mask"], kept = seen, seen[:, 0].any(1)
    if positions is not None and positions.ndim == 3:
        inputs |= {"position_ids": positions[:, 0], "block_position_ids": positions[:, 1]}
    with torch.no_grad():
        return (model(case["input_ids"], **inputs).logits - expected)[kept].abs().max().item()


def reference_of(family):
    if family == "glm-130b":
        return "the equations of arXiv 2210.02414, written out"
    if family in FIXTURES_OF:
        return "its public code, recorded in float32"
    return f"transformers `{FAMILIES[family].architecture}`"


def rows():
    for family in FAMILIES:
        names = presets_of(family)
        error = "within 1e-5" if family == "glm-130b" else f"{largest_error(family):.1e}"
        presets = ", ".join(f"`{name}`" for name in names)
        yield f"| `{family}` | {presets} | {what_makes_it_itself(family)} | {reference_of(family)} | {error} |"


def table():
    head = "| family | presets | what makes it itself | equal to | largest error |\n|---|---|---|---|---|\n"
    return head + "".join(f"{row}\n" for row in rows())


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help="put the table into docs/families.md")
    torch.set_num_threads(1)
    logging.disable_progress_bar()
    if parser.parse_args().write:
        page = PAGE.read_text("utf-8")
        before, _, rest = page.partition(MARKS[0])
        PAGE.write_text(f"{before}{MARKS[0]}{table()}{MARKS[1]}{rest.partition(MARKS[1])[2]}", "utf-8")
    else:
        print(table())


if __name__ == "__main__":
    main()
