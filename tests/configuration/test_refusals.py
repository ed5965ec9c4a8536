"""What cannot be is refused when the config is made, naming both fields, the value and the way out."""

import math
from typing import get_args

import pytest
from matrix_cases import tiny_config

from minillm import MiniLLMConfig, MiniLLMForCausalLM
from minillm.configuration.feed_forward_fields import MOE_DEFAULTS
from minillm.configuration.field_ranges import FIELD_OWNERS, POSITIVE_FIELDS, UNIT_INTERVAL_FIELDS
from minillm.configuration.spellings import FOREIGN_SPELLINGS, KNOWN_EXTRA_KEYS, ONLY_READ_ELSEWHERE
from minillm.configuration.token_fields import TOKEN_FIELDS

HINTS = MiniLLMConfig.__annotations__
OWNED = {
    "prompt_is_prefix": False,
    "answer_start_token_id": 5,
    "turn_token_ids": [5, 6],
    "mask_token_id": 3,
    "gmask_token_id": 3,
    "smask_token_id": 3,
    "sop_token_id": 4,
    "rope_interleaved": True,
    "rope_2d": True,
    "position_table_size": 40,
    "alibi_scale": 2.0,
    "alibi_bias_max": 4.0,
    "alibi_rounding": "bloom",
    "sandwich_dim": 6,
    "deepnorm_alpha": 2.0,
    "deepnorm_beta": 0.5,
    "num_parallel_norms": 2,
    "mlp_bias": True,
    "num_local_experts": 4,
    "num_experts_per_tok": 1,
    "router_aux_loss_coef": 0.5,
    "router_jitter_noise": 0.1,
    "output_router_logits": True,
}


def values_of(field):
    hint = HINTS[field]
    return (True, False) if hint is bool else get_args(hint)


def message_of(make):
    with pytest.raises(ValueError) as caught:
        make()
    return str(caught.value)


def test_every_owned_field_has_a_value_here():
    assert set(OWNED) == set(FIELD_OWNERS)


# Of models of another kind.
FOREIGN = {
    "is_encoder_decoder": True,
    "add_cross_attention": True,
    "cross_attention_hidden_size": 32,
    "tie_encoder_decoder": True,
    "pruned_heads": {0: [1]},
    "chunk_size_feed_forward": 4,
}

# Fields that are given together.
PARTNERS = {
    **{name: {"sop_token_id": 4} for name in ("mask_token_id", "gmask_token_id", "smask_token_id")},
    "sop_token_id": {"mask_token_id": 3},
    "answer_start_token_id": {"turn_token_ids": [5, 6]},
    "turn_token_ids": {"answer_start_token_id": 5},
}


@pytest.mark.parametrize("field", OWNED)
def test_a_field_without_its_owner_is_refused(field):
    owner, allowed = FIELD_OWNERS[field]
    for value in values_of(owner):
        fields = {owner: value, field: OWNED[field]}
        if value in allowed:
            assert getattr(tiny_config(**fields, **PARTNERS.get(field, {})), field) == OWNED[field]
            continue
        message = message_of(lambda fields=fields: tiny_config(**fields))
        assert f"`{field}={OWNED[field]!r}`" in message and f"`{owner}={value!r}`" in message
        assert all(repr(way_out) in message.split(" set ")[1] for way_out in allowed)


GPT = {"mlp_type": "mlp"}
MOE = {"mlp_type": "moe"}
# Fields, those assigned later, and words of the message.
CONFLICTS = [
    (
        {"rope_theta": 5e5},
        {"position_embedding_type": "alibi"},
        ["rope_parameters={", "position_embedding_type='alibi'"],
    ),
    ({}, {"num_attention_heads": 5}, ["hidden_size=32", "num_attention_heads=5", "set `head_dim`"]),
    ({"num_key_value_heads": 3}, {}, ["num_attention_heads=4", "num_key_value_heads=3"]),
    ({"hidden_act": "swish2"}, {}, ["hidden_act='swish2'", "ACT2FN", "mlp_type='glu'"]),
    ({**GPT, "hidden_act": "gtu"}, {}, ["hidden_act='gtu'", "mlp_type='mlp'", "set `mlp_type='glu'`"]),
    ({**GPT, "hidden_act": "bilinear"}, {}, ["hidden_act='bilinear'", "mlp_type='mlp'"]),
    ({**MOE, "num_experts_per_tok": 9}, {}, ["num_experts_per_tok=9", "num_local_experts=8"]),
    ({**MOE, "num_experts_per_tok": 0}, {}, ["num_experts_per_tok=0", "between 1 and"]),
    ({**MOE, "num_local_experts": 0}, {}, ["num_experts_per_tok=2", "num_local_experts=0"]),
    ({**MOE, "router_aux_loss_coef": -0.1}, {}, ["router_aux_loss_coef=-0.1", "not negative"]),
    ({**MOE, "router_aux_loss_coef": math.inf}, {}, ["router_aux_loss_coef=inf", "finite"]),
    ({"norm_bias": True}, {}, ["norm_bias=True", "norm_type='rmsnorm'", "set `norm_type='layernorm'`"]),
    ({"norm_head": True, "tie_word_embeddings": True}, {}, ["norm_head=True", "tie_word_embeddings=True", "untie"]),
    *(
        (
            {"parallel_residual": True, "norm_placement": placement},
            {},
            ["parallel_residual=True", f"norm_placement='{placement}'", "set `norm_placement='pre'`"],
        )
        for placement in ("post", "deepnorm", "sandwich")
    ),
    (
        {"use_cache": True, "attention_type": "bidirectional"},
        {},
        ["use_cache=True", "attention_type='bidirectional'", "leave `use_cache` out"],
    ),
    *(
        (
            {"position_embedding_type": "alibi", "alibi_rounding": rounding, "attention_type": kind},
            {},
            [f"alibi_rounding='{rounding}'", f"attention_type='{kind}'", "set `alibi_rounding='none'`"],
        )
        for rounding in ("bloom", "falcon")
        for kind in ("prefix", "bidirectional")
    ),
    ({"scale_residual_init": True, "norm_placement": "deepnorm"}, {}, ["scale_residual_init=True", "'deepnorm'"]),
    ({"pad_token_id": 19}, {}, ["pad_token_id=19", "vocab_size=19"]),
    ({"pad_token_id": -1}, {}, ["pad_token_id=-1", "vocab_size=19"]),
    ({"attention_type": "prefix"}, {"sop_token_id": 4}, ["sop_token_id=4", "mask_token_id", "together"]),
    ({"attention_type": "prefix"}, {"gmask_token_id": 3}, ["sop_token_id=None", "gmask_token_id", "together"]),
    ({"sliding_window": 1}, {}, ["sliding_window=1", "2 or more"]),
    ({"sliding_window": 2**63}, {}, ["sliding_window=9223372036854775808", "64-bit"]),
    ({"attention_type": "prefix"}, {"turn_token_ids": [5]}, ["answer_start_token_id=None", "turn_token_ids=[5]"]),
    ({"attention_type": "prefix"}, {"answer_start_token_id": 5}, ["answer_start_token_id=5", "turn_token_ids=None"]),
    *(({name: value}, {}, [f"{name}={value!r}", "decoder-only"]) for name, value in FOREIGN.items()),
    *(
        ({}, {name: 3}, [f"`{name}=3`", f"set `{meant}`", "parts of transformers"])
        for name, meant in ONLY_READ_ELSEWHERE.items()
    ),
    ({}, {"configuration_files": ["config.4.0.json"]}, ["configuration_files=", "another file"]),
    ({}, {"is_causal": False}, ["is_causal=False", "attention_type='causal'"]),
    ({"attention_type": "bidirectional"}, {"is_causal": True}, ["is_causal=True", "attention_type='bidirectional'"]),
    ({"position_embedding_type": "sandwich", "sandwich_dim": 5}, {}, ["sandwich_dim=5", "must be even"]),
]


def provoke(fields, later):
    config = tiny_config(**fields)
    for name, value in later.items():
        setattr(config, name, value)
    config.validate_architecture()


@pytest.mark.parametrize(("fields", "later", "words"), CONFLICTS, ids=lambda part: "-".join(map(str, part)))
def test_a_contradiction_is_refused(fields, later, words):
    message = message_of(lambda: provoke(fields, later))
    assert all(word in message for word in words), message


def test_every_contradiction_is_provoked(monkeypatch):
    found, count = set(), len(tiny_config()._conflicts())
    conflicts = MiniLLMConfig._conflicts

    def watched(config):
        pairs = conflicts(config)
        found.update(index for index, (wrong, _) in enumerate(pairs) if wrong)
        return pairs

    monkeypatch.setattr(MiniLLMConfig, "_conflicts", watched)
    for fields, later, _ in CONFLICTS:
        message_of(lambda fields=fields, later=later: provoke(fields, later))
    assert found == set(range(count))


def test_a_contradiction_assigned_later_is_refused_when_the_model_is_built():
    config = tiny_config()
    config.norm_head = config.tie_word_embeddings = True
    with pytest.raises(ValueError, match="norm_head=True"):
        MiniLLMForCausalLM(config)


def test_heads_must_divide_the_width():
    assert "set `head_dim`" in message_of(lambda: tiny_config(num_attention_heads=5))
    assert tiny_config(num_attention_heads=5, head_dim=6).head_dim == 6
    assert "`num_attention_heads=0`" in message_of(lambda: tiny_config(num_attention_heads=0))


NEEDS = {
    "router_jitter_noise": MOE,
    "position_table_size": {"position_embedding_type": "learned"},
    "alibi_scale": {"position_embedding_type": "alibi"},
    "alibi_bias_max": {"position_embedding_type": "alibi"},
    "sandwich_dim": {"position_embedding_type": "sandwich"},
    "deepnorm_alpha": {"norm_placement": "deepnorm"},
    "deepnorm_beta": {"norm_placement": "deepnorm"},
    "num_attention_heads": {"head_dim": 8},
    "hidden_size": {"head_dim": 8},
}


def is_float(field):
    return float in get_args(HINTS[field])


def test_every_number_has_a_range():
    """Ids, the number of norms and experts are checked elsewhere, and a schema may only be too new."""
    elsewhere = {"num_parallel_norms", "schema_version", "pad_token_id", *TOKEN_FIELDS, *MOE_DEFAULTS}
    numbers = {name for name, hint in HINTS.items() if {int, float} & {hint, *get_args(hint)}}
    assert {*POSITIVE_FIELDS, *UNIT_INTERVAL_FIELDS} == numbers - elsewhere


@pytest.mark.parametrize("field", POSITIVE_FIELDS)
def test_sizes_must_be_positive(field):
    for value in (0, -3, *((math.nan, math.inf) if is_float(field) else ())):
        message = message_of(lambda value=value: tiny_config(**{**NEEDS.get(field, {}), field: value}))
        assert f"`{field}={value}` must be positive" in message


@pytest.mark.parametrize("field", UNIT_INTERVAL_FIELDS)
def test_fractions_must_lie_between_0_and_1(field):
    for value in (-0.1, 1.1, 2, math.nan):
        fields = {**NEEDS.get(field, {}), field: value}
        assert f"`{field}={value}` must lie" in message_of(lambda fields=fields: tiny_config(**fields))
    for value in (0, 1, 0.5):
        assert getattr(tiny_config(**{**NEEDS.get(field, {}), field: value}), field) == value


def fits(value, hint):
    """Whether a value is of an annotated type: strictly, so that True is no integer and 4.0 none either."""
    if get_args(hint) and hint not in (list[int],):
        return any(fits(value, part) for part in get_args(hint))
    if hint == list[int]:
        return isinstance(value, list) and all(type(item) is int for item in value)
    return type(value) is hint if isinstance(hint, type) else type(value) is type(hint) and value == hint


@pytest.mark.parametrize("field", HINTS)
def test_wrong_types_are_refused_by_field_and_value(field):
    candidates = ["something", 4, 4.5, True, None, [2, "a"], [2], {"a": 1}]
    wrong = [value for value in candidates if not fits(value, HINTS[field])]
    assert len(wrong) >= 4
    for value in wrong:
        with pytest.raises(Exception, match=field) as caught:
            tiny_config(**{field: value})
        assert type(caught.value).__name__ == "StrictDataclassFieldValidationError"
        assert str(value) in str(caught.value)


def test_every_foreign_spelling_names_a_field():
    assert set(FOREIGN_SPELLINGS.values()) <= set(MiniLLMConfig.__annotations__)
    assert not set(FOREIGN_SPELLINGS) & (set(MiniLLMConfig.__dataclass_fields__) | KNOWN_EXTRA_KEYS)


@pytest.mark.parametrize("key", FOREIGN_SPELLINGS)
def test_foreign_spellings_are_refused_by_name(key):
    message = message_of(lambda: tiny_config(**{key: 7}))
    assert f"`{key}=7`" in message and f"did you mean `{FOREIGN_SPELLINGS[key]}`" in message


@pytest.mark.parametrize(
    ("key", "field"),
    [
        ("hiden_size", "hidden_size"),
        ("hidden_sizes", "hidden_size"),
        ("num_hidden_layer", "num_hidden_layers"),
        ("num_key_values_heads", "num_key_value_heads"),
        ("positions_embedding_type", "position_embedding_type"),
        ("rope_parameter", "rope_parameters"),
        ("attention_dropouts", "attention_dropout"),
        ("tie_word_embedding", "tie_word_embeddings"),
        ("pad_token", "pad_token_id"),
        ("use_parallel_residual", "parallel_residual"),
    ],
)
def test_near_misses_are_refused_by_name(key, field):
    assert f"`{key}=7` is not a field of MiniLLMConfig; did you mean `{field}`" in message_of(
        lambda: tiny_config(**{key: 7})
    )


@pytest.mark.parametrize(("field", "value"), [("sliding_window", 4), ("attention_qkv_bias", True)])
def test_layers_that_differ_are_refused(field, value):
    assert "`per_layer_config`" in message_of(lambda: tiny_config(per_layer_config={0: {field: value}}))
