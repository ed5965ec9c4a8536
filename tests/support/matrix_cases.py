"""Tiny models and batches for the tests that hold the model against the naive twin in `reference.py`."""

import pytest
import torch
from reference import reference_logits
from variants import variants

from minillm import MiniLLMConfig, MiniLLMForCausalLM

VOCAB = 19
LENGTH = 10
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 24,
    "max_position_embeddings": 32,
}
POSITIONS = variants(
    "rope rope_interleaved_partial rope_2d alibi_scaled alibi_bloom alibi_falcon sandwich learned sinusoidal "
    "glm_2d none"
)
CAUSAL_ONLY = ("alibi_bloom", "alibi_falcon")
TWO_AXES = ("rope_2d", "glm_2d")
SHARING = {"mha": 4, "gqa": 2, "mqa": 1}
WINDOWS = {"full": None, "window3": 3}


def tiny_config(**fields):
    return MiniLLMConfig(**{**SIZES, **fields})


def loud_model(config, seed=0, scale=0.2):
    """A model in evaluation mode whose weights are large enough that every mask and bias shows in its logits."""
    torch.manual_seed(seed)
    model = MiniLLMForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = scale * torch.randn_like(parameter)
            parameter.copy_(parameter + noise if parameter.ndim == 1 else noise)
    return model.eval()


def double_weights(model):
    """The weights by name in double precision, as leaves that take a gradient; tied ones once."""
    return {name: parameter.detach().double().requires_grad_() for name, parameter in model.named_parameters()}


def attention_cases(attention_types=("causal", "prefix", "bidirectional")):
    """(id, config fields) of every attention type with every position scheme, head sharing and window."""
    for attention_type in attention_types:
        for scheme, fields in POSITIONS.items():
            if scheme in CAUSAL_ONLY and attention_type != "causal":
                continue
            for sharing, key_heads in SHARING.items():
                for window_name, window in WINDOWS.items():
                    yield (
                        f"{attention_type}-{scheme}-{sharing}-{window_name}",
                        {
                            "attention_type": attention_type,
                            "num_key_value_heads": key_heads,
                            "sliding_window": window,
                            **fields,
                        },
                    )


def windows_mostly_thorough(cases):
    """The cases for `parametrize`: by default a window runs with grouped keys only, the others are thorough."""
    slow = ("-mha-window3", "-mqa-window3")
    return [pytest.param(case, marks=[pytest.mark.thorough] * case.endswith(slow)) for case in cases]


def has_two_axes(config):
    return config.rope_2d or config.position_embedding_type == "glm_2d"


def rows(*texts):
    return torch.tensor([[int(character) for character in text] for text in texts])


# One string a row: 1 real, 0 padding; 1 prefix; document numbers; positions. Values at padding are noise on purpose.
LAYOUTS = {
    "plain": {"prefix_mask": rows("1111000000", "1111111110")},
    "left_padding": {
        "attention_mask": rows("0001111111", "0111111111"),
        "prefix_mask": rows("0101110000", "1111111000"),
    },
    "right_padding": {
        "attention_mask": rows("1111111000", "1111111110"),
        "prefix_mask": rows("1110000000", "1111110000"),
    },
    "hole": {
        "attention_mask": rows("1110011111", "1101011111"),
        "prefix_mask": rows("1110100000", "1111010000"),
    },
    "packing": {
        "document_ids": rows("0000111222", "3333333555"),
        "prefix_mask": rows("1100110110", "1000000110"),
    },
    "packing_by_positions": {
        "position_ids": rows("0123012001", "0123456789"),
        "prefix_mask": rows("1100110000", "1111000000"),
    },
    "positions_of_choice": {
        "attention_mask": rows("1111111111", "0111111111"),
        "position_ids": rows("0123222222", "5124680357"),
        "prefix_mask": rows("1111000000", "0110000000"),
    },
    "packing_prefix_padding": {
        "attention_mask": rows("0011101110", "1111001101"),
        "document_ids": rows("7700091110", "2222004404"),
        "prefix_mask": rows("0011001100", "1111001000"),
    },
}


HOLES = ("hole", "packing_prefix_padding")
"""Layouts with padding between real tokens, which a sliding window would count."""


def layouts_of(config):
    """The layouts that a config takes."""
    return [layout for layout in LAYOUTS if config.sliding_window is None or layout not in HOLES]


def batch(config, layout):
    """Input ids and the layout's per-token inputs, less those that mean nothing to the config.

    Schemes of two axes get a second one, except with packing by positions, which it would switch off.
    """
    inputs = dict(LAYOUTS[layout])
    if config.attention_type != "prefix":
        del inputs["prefix_mask"]
    if has_two_axes(config) and layout != "packing_by_positions":
        inputs["block_position_ids"] = rows("0000123456", "0012001230")
    tokens = torch.randint(0, VOCAB, (2, LENGTH), generator=torch.Generator().manual_seed(3))
    return {"input_ids": tokens, **inputs}


def real_tokens(inputs):
    return inputs.get("attention_mask", torch.ones_like(inputs["input_ids"])).bool()


def probe(logits, real):
    """A scalar that weighs every logit at a real token differently."""
    coefficients = torch.randn(logits.shape, generator=torch.Generator().manual_seed(4)).to(logits)
    return (logits * coefficients * real[..., None]).sum()


def reference_run(config, weights, inputs, training=False):
    """Logits and gradients by parameter name of the twin."""
    logits = reference_logits(config, weights, **inputs, training=training)
    gradients = torch.autograd.grad(probe(logits, real_tokens(inputs)), list(weights.values()), allow_unused=True)
    return logits.detach(), dict(zip(weights, gradients, strict=True))


def model_run(model, inputs):
    model.zero_grad()
    logits = model(**inputs, use_cache=False).logits
    probe(logits, real_tokens(inputs)).backward()
    return logits.detach(), {name: parameter.grad for name, parameter in model.named_parameters()}


def assert_close(got, expected, what, tolerance=1e-5):
    """Equal within `tolerance` of the largest expected value."""
    scale = expected.abs().max().clamp(min=1e-3)
    difference = (got.double() - expected).abs().max()
    assert difference <= tolerance * scale, f"{what}: off by {difference:.2e} at scale {scale:.2e}"


def assert_same_run(got, expected, inputs, what, tolerance=1e-5):
    """Logits at real tokens and all gradients equal; a parameter without a gradient may have zeros instead of none."""
    real = real_tokens(inputs)
    assert_close(got[0][real], expected[0][real], f"{what}: logits", tolerance)
    largest = max(gradient.abs().max() for gradient in expected[1].values() if gradient is not None)
    assert largest > 0.1
    for name, gradient in expected[1].items():
        mine = got[1][name]
        wanted = torch.zeros(()) if gradient is None else gradient
        mine = torch.zeros_like(wanted) if mine is None else mine
        # A gradient far below the others (a key's bias has none but rounding) is held to the scale of the whole.
        scale = max(wanted.abs().max(), 5e-2 * largest)
        difference = (mine.double() - wanted).abs().max()
        assert difference <= tolerance * scale, f"{what}: gradient of {name} off by {difference:.2e} at {scale:.2e}"
