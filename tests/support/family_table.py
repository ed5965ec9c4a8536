"""Makes the table of docs/families.md: python tests/support/family_table.py [--write].

A row per family: what makes it itself, read off its presets; what it is held to; the largest difference of logits.
"""

import argparse
import functools
import math
import tempfile
from pathlib import Path

import torch
from family_equations import FAMILY_OF, FOLDER, RECORDED, Equations, Text, draw_folder
from native_families import CASES, VOCAB, native_model
from safetensors.torch import load_file
from transformers.utils import logging

from minillm import MiniLLMConfig
from minillm.configuration import PRESETS
from minillm.conversion import FAMILIES, load

PAGE = Path(__file__).parents[2] / "docs" / "families.md"
MARKS = ("<!-- families -->\n", "<!-- end of families -->\n")
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


def compared(family):
    """Pairs of MiniLLM's float32 logits and the reference's, over the family's tiny checkpoints."""
    for name, (kind, _) in CASES.items():
        if kind == family:
            native = native_model(name)
            with tempfile.TemporaryDirectory() as folder:
                native.save_pretrained(folder)
                ours = load(folder, family=family).eval()
            ids = torch.randint(3, VOCAB, (3, 12), generator=torch.Generator().manual_seed(2))
            yield ours(ids).logits, native(ids).logits
    for name in [name for name, of in FAMILY_OF.items() if of == family]:
        yield from compared_with_record(name) if name in RECORDED else compared_with_equations(name)


def compared_with_record(name):
    """With the reference's own masks and positions; the tests make them from the token ids."""
    model, cases = load(FOLDER / name).eval(), load_file(FOLDER / name / "cases.safetensors")
    for key in [key.removesuffix(".logits") for key in cases if key.endswith(".logits")]:
        case = {name.partition(".")[2]: value for name, value in cases.items() if name.startswith(f"{key}.")}
        inputs, kept = {}, torch.ones(case["input_ids"].shape, dtype=torch.bool)
        mask, positions = case.get("attention_mask"), case.get("position_ids")
        if mask is not None and mask.ndim == 2:
            inputs["attention_mask"], kept = mask, mask.bool()
        elif mask is not None:
            # ChatGLM marks what is hidden, GLM what is seen; the first token is seen by all.
            seen = mask.bool() == mask[:, :, :1, :1].bool()
            inputs["attention_mask"], kept = seen, seen[:, 0].any(1)
        if positions is not None and positions.ndim == 3:
            inputs |= {"position_ids": positions[:, 0], "block_position_ids": positions[:, 1]}
        yield model(case["input_ids"], **inputs).logits[kept], case["logits"][kept]


def compared_with_equations(name):
    """Three texts, each with a prefix if the family reads one."""
    with tempfile.TemporaryDirectory() as parent:
        folder = Path(parent) / name
        draw_folder(name, folder)
        equations, model = Equations(name, folder), load(folder, family=FAMILY_OF[name]).eval()
    ids = torch.randint(3, 120, (3, 12), generator=torch.Generator().manual_seed(2))
    prefix, inputs = 0, {}
    if model.config.attention_type == "prefix":
        prefix = 8
        inputs["prefix_mask"] = (torch.arange(12) < prefix).long().expand(3, 12)
    expected = torch.stack([equations.logits(Text(row, prefix)) for row in ids.tolist()])
    yield model(ids, **inputs).logits, expected


@functools.cache
def measure(family):
    """The largest difference of logits, and the largest logit of each comparison."""
    with torch.no_grad():
        pairs = list(compared(family))
    return (
        max((found - expected).abs().max().item() for found, expected in pairs),
        [expected.abs().max().item() for _, expected in pairs],
    )


def at_most(error):
    """What the page says: twice the error, rounded up to a digit; the rounding of float32 at least, for what is equal
    on one machine is not so on each; 1e-5 at most, to which the tests hold all of them.
    """
    if error <= 5e-7:
        return 1e-6
    scale = 10.0 ** math.floor(math.log10(2 * error))
    return min(1e-5, math.ceil(2 * error / scale) * scale)


def reference_of(family):
    names = [name for name, of in FAMILY_OF.items() if of == family]
    if not names:
        return f"transformers `{FAMILIES[family].architecture}`"
    recorded = [name for name in names if name in RECORDED]
    if not recorded:
        return "its equations (arXiv 2210.02414)"
    drawn = [f"; {name} by its equations alone" for name in names if name not in RECORDED]
    return "its public code, recorded in float32" + "".join(drawn)


def rows():
    for family in FAMILIES:
        names = presets_of(family)
        error = f"{at_most(measure(family)[0]):.0e}"
        presets = ", ".join(f"`{name}`" for name in names)
        yield f"| `{family}` | {presets} | {what_makes_it_itself(family)} | {reference_of(family)} | {error} |"


def table():
    head = "| family | presets | what makes it itself | equal to | largest error, at most |\n|---|---|---|---|---|\n"
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
