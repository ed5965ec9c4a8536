"""Random models and batches for tests that draw their cases, and how many of them each run draws.

A property that holds for any case stands in a function under `random_test`, which makes two tests of it: a quick one,
whose cases are the same in each run, and one under the mark `fuzz`, with new cases each time. A failure prints the
smallest case that fails, the seed, and a line of `reproduce_failure` that brings the case back below `random_test`.
"""

from contextlib import contextmanager

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from matrix_cases import has_two_axes, loud_model
from reference import describe_rows

from minillm import MiniLLMConfig, blocked_attention
from minillm.tuning import tuning

PARTS = {"quick": None, "ci": 20, "full": 1}
"""Profiles of hypothesis, and of how many cases under `fuzz` each draws one."""
LARGE = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.large_base_example]
VOCAB = 11
LONGEST = 7


def register_profiles():
    """Declares the profiles, of which `quick` holds unless `--hypothesis-profile` names another."""
    for name in PARTS:
        settings.register_profile(
            name,
            derandomize=name == "quick",
            deadline=None,
            database=None,
            print_blob=True,
            suppress_health_check=LARGE,
        )
    settings.load_profile("quick")


def random_test(quick, full, **strategies):
    """Makes a test of a property, which is called with what the strategies draw, by name.

    Args:
        quick: cases of a default run, the same ones until the test changes.
        full: cases of `-m fuzz --hypothesis-profile=full`; with `ci`, or without a profile, a part of them.
    """

    def decorate(property_of):
        @pytest.mark.parametrize("cases", ["quick", pytest.param("many", marks=pytest.mark.fuzz)])
        def test(cases):
            chosen = settings.get_current_profile_name()
            profile = "quick" if cases == "quick" else "ci" if chosen == "quick" else chosen
            count = quick if cases == "quick" else -(-full // PARTS[profile])
            settings(settings.get_profile(profile), max_examples=count)(given(**strategies)(property_of))()

        test.__name__, test.__doc__, test.__module__ = (
            property_of.__name__,
            property_of.__doc__,
            property_of.__module__,
        )
        return test

    return decorate


def maybe(strategy):
    return st.none() | strategy


def settings_of(**strategies):
    """Fields of a config, each of which may be left out."""
    return st.fixed_dictionaries({}, optional=strategies)


# --- configs ---

POSITIONS = st.sampled_from(["rope", "alibi", "sandwich", "learned", "sinusoidal", "glm_2d", "none"])
ACTS = st.sampled_from(["silu", "gelu", "relu", "gelu_new", "tanh"])


@st.composite
def positions_of_any_kind(draw, attention_type, head_dim):
    """Fields of a position scheme, within what the config takes."""
    scheme = draw(POSITIONS)
    fields = {"position_embedding_type": scheme}
    if scheme == "rope":
        pairs = head_dim // 2
        fields["rope_interleaved"] = draw(st.booleans())
        fields["rope_2d"] = head_dim % 4 == 0 and draw(st.booleans())
        fields["rope_parameters"] = draw(rope_dictionaries(pairs, fields["rope_2d"]))
    if scheme == "alibi":
        fields["alibi_scale"] = draw(st.sampled_from([1.0, 0.5, 8**-0.5]))
        fields["alibi_bias_max"] = draw(st.sampled_from([8.0, 4.0, 3]))
        if attention_type == "causal":
            fields["alibi_rounding"] = draw(st.sampled_from(["none", "bloom", "falcon"]))
    if scheme == "sandwich":
        fields["sandwich_dim"] = 2 * draw(st.integers(1, 5))
    if scheme in ("learned", "glm_2d"):
        fields["position_table_size"] = draw(st.integers(LONGEST + 1, 16))
    return fields


def rope_dictionaries(pairs, two_axes=False):
    """`rope_parameters` for a head of so many pairs of channels."""
    types = ["default", "linear"] if two_axes else ["default", "linear", "yarn", "llama3", "longrope"]
    if pairs > (2 if two_axes else 1):
        types += ["ntk"] if two_axes else ["ntk", "dynamic"]
    return st.sampled_from(types).flatmap(lambda kind: rope_of(kind, pairs, two_axes))


FACTORS = st.floats(1.0, 8.0)
ORIGINAL = st.integers(2, 16)


@st.composite
def rope_of(draw, kind, pairs, two_axes):
    rope = {"rope_type": kind, "rope_theta": draw(st.sampled_from([100.0, 10000, 1e6]))}
    rotated = pairs
    if not two_axes and draw(st.booleans()):
        rotated = draw(st.integers(2 if kind in ("ntk", "dynamic") else 1, pairs))
        # A little more, since a part may fall short of the whole number that it stands for.
        rope["partial_rotary_factor"] = min(1.0, (rotated + 0.01) / pairs)
    if kind in ("linear", "ntk", "dynamic", "yarn", "llama3"):
        rope["factor"] = draw(FACTORS)
    if kind in ("yarn", "llama3", "longrope"):
        rope["original_max_position_embeddings"] = draw(ORIGINAL)
    if kind == "llama3":
        rope["low_freq_factor"] = draw(st.floats(0.5, 2.0))
        rope["high_freq_factor"] = draw(st.floats(2.5, 8.0))
    if kind == "yarn":
        rope |= draw(
            settings_of(
                attention_factor=st.floats(0.5, 2.0),
                beta_fast=st.floats(16.0, 40.0),
                beta_slow=st.floats(0.5, 2.0),
                truncate=st.booleans(),
            )
        )
    if kind == "longrope":
        sizes = st.lists(st.floats(1.0, 4.0), min_size=rotated, max_size=rotated)
        rope |= {"short_factor": draw(sizes), "long_factor": draw(sizes)}
        rope |= draw(settings_of(factor=FACTORS, attention_factor=st.floats(0.5, 2.0)))
    return rope


@st.composite
def config_fields(draw, attention_types=("causal", "prefix", "bidirectional"), positions=None):
    """Fields that a config takes, of a model that is as small as can be."""
    attention_type = draw(st.sampled_from(attention_types))
    heads = draw(st.integers(1, 5))
    head_dim = 2 * draw(st.integers(1, 4))
    fields = {
        "vocab_size": VOCAB,
        "hidden_size": heads * head_dim,
        "num_hidden_layers": draw(st.integers(1, 2)),
        "num_attention_heads": heads,
        "num_key_value_heads": draw(st.sampled_from([n for n in range(1, heads + 1) if heads % n == 0])),
        "intermediate_size": draw(st.integers(1, 8)),
        "max_position_embeddings": draw(st.integers(LONGEST + 1, 16)),
        "attention_type": attention_type,
        "norm_eps": draw(st.sampled_from([1e-6, 1e-5, 1e-2])),
    }
    if draw(st.booleans()):
        fields |= {"hidden_size": 2 * draw(st.integers(1, 8)), "head_dim": head_dim}
    fields |= draw(positions_of_any_kind(attention_type, head_dim) if positions is None else positions)
    fields |= draw(
        settings_of(
            sliding_window=st.integers(2, LONGEST + 1),
            qk_norm=st.booleans(),
            attention_qkv_bias=st.booleans(),
            attention_out_bias=st.booleans(),
            embedding_norm=st.booleans(),
            final_norm=st.booleans(),
            embedding_gradient_scale=st.floats(0, 1),
        )
    )
    return fields | draw(norms()) | draw(feed_forwards()) | draw(heads_of_words())


@st.composite
def norms(draw):
    fields = {"norm_type": draw(st.sampled_from(["rmsnorm", "layernorm"]))}
    if fields["norm_type"] == "layernorm":
        fields |= draw(settings_of(norm_bias=st.booleans()))
    fields["norm_placement"] = draw(st.sampled_from(["pre", "post", "deepnorm", "sandwich"]))
    if fields["norm_placement"] == "deepnorm":
        fields |= draw(settings_of(deepnorm_alpha=st.floats(0.5, 3), deepnorm_beta=st.floats(0.5, 3)))
    elif fields["norm_placement"] == "pre" and draw(st.booleans()):
        fields |= {"parallel_residual": True, "num_parallel_norms": draw(st.sampled_from([1, 2]))}
    return fields


@st.composite
def feed_forwards(draw):
    kind = draw(st.sampled_from(["glu", "mlp", "moe"]))
    act = draw(ACTS if kind == "mlp" else ACTS | st.sampled_from(["gtu", "bilinear"]))
    fields = {"mlp_type": kind, "hidden_act": act}
    if kind == "moe":
        experts = draw(st.integers(1, 4))
        return fields | {"num_local_experts": experts, "num_experts_per_tok": draw(st.integers(1, experts))}
    return fields | draw(settings_of(mlp_bias=st.booleans()))


def heads_of_words():
    return st.sampled_from([{}, {"tie_word_embeddings": True}, {"norm_head": True}])


def loud(fields, seed=0):
    return loud_model(MiniLLMConfig(**fields), seed)


# --- batches ---


@st.composite
def batches(draw, config, rows=2):
    """Inputs of a forward, less those that the config does not take. What stands at padding is noise."""
    shape = (draw(st.integers(1, rows)), draw(st.integers(1, LONGEST)))
    inputs = {}
    if draw(st.booleans()):
        inputs["attention_mask"] = table(draw, shape, st.integers(0, 1))
        if config.sliding_window is not None:
            inputs["attention_mask"] = without_holes(inputs["attention_mask"])
    if draw(st.booleans()):
        inputs["document_ids"] = draw(documents(shape, inputs.get("attention_mask")))
    if draw(st.booleans()):
        positions = st.integers(0, LONGEST if config.position_table_size else 40)
        inputs["position_ids"] = table(draw, some_rows(draw, shape), positions)
    if has_two_axes(config) and draw(st.booleans()):
        inputs["block_position_ids"] = table(draw, some_rows(draw, shape), st.integers(0, LONGEST))
    if config.attention_type == "prefix" and draw(st.integers(0, 3)):
        inputs["prefix_mask"] = draw(prompts(shape, inputs))
    return {"input_ids": table(draw, shape, st.integers(0, VOCAB - 1)), **inputs}


def table(draw, shape, numbers):
    rows, columns = shape
    row = st.lists(numbers, min_size=columns, max_size=columns)
    return torch.tensor(draw(st.lists(row, min_size=rows, max_size=rows)))


def some_rows(draw, shape):
    """The shape, or that of one row for all."""
    return (shape[0] if draw(st.booleans()) else 1, shape[1])


def without_holes(mask):
    """A mask whose real tokens lie side by side."""
    return (mask.cumsum(-1).clamp(max=1) & mask.flip(-1).cumsum(-1).flip(-1).clamp(max=1)).long()


@st.composite
def documents(draw, shape, attention_mask):
    """Numbers that do not fall over real tokens."""
    steps = table(draw, shape, st.sampled_from([0, 0, 1, 5]))
    numbers = steps.cumsum(-1) + draw(st.integers(-3, 3))
    if attention_mask is None:
        return numbers
    noise = table(draw, shape, st.integers(-9, 9))
    return torch.where(attention_mask.bool(), numbers, noise)


@st.composite
def prompts(draw, shape, inputs):
    """A prefix mask whose numbers rise from prompt to prompt of each document."""
    mask = table(draw, shape, st.integers(0, 1)).tolist()
    for row, known in zip(mask, describe_rows(shape, **inputs), strict=True):
        number, last = 0, None
        for slot, document in enumerate(known.document):
            if document is None:
                row[slot] = draw(st.integers(0, 3))
                continue
            if last is not None and last[0] != document:
                number, last = 0, None
            if row[slot] and not (last is not None and last[1]):
                number += draw(st.integers(1, 2))
            last = (document, row[slot])
            row[slot] *= number
    return torch.tensor(mask)


def real_of(inputs):
    return inputs.get("attention_mask", torch.ones_like(inputs["input_ids"])).bool()


# --- back ends ---


@contextmanager
def attending(model, back_end):
    """Has a model attend by "eager", "sdpa", or SDPA in "blocks" of two queries."""
    model.set_attn_implementation("sdpa" if back_end == "blocks" else back_end)
    with pytest.MonkeyPatch.context() as patch:
        if back_end == "blocks":
            patch.setattr(tuning, "blocks_from", 2)
            patch.setattr(blocked_attention, "block_size", lambda length: 2)
        yield


BACK_ENDS = st.sampled_from(["eager", "sdpa", "blocks"])
