"""`rope_parameters` and its old spellings mean what they mean to transformers' Llama, or are refused."""

import copy
import math

import pytest
from matrix_cases import tiny_config
from transformers import LlamaConfig

from minillm import MiniLLMConfig, MiniLLMForCausalLM
from minillm.configuration.rope_fields import FOREIGN_ROPE_KEYS, ROPE_KEYS


def message_of(make):
    with pytest.raises(ValueError) as caught:
        make()
    return str(caught.value)


ROPE_WORDS = [
    ({"base": 5e5}, ["rope_parameters['base']", "did you mean `rope_theta`"]),
    ({"rope_thetta": 5e5}, ["rope_parameters['rope_thetta']", "did you mean `rope_theta`"]),
    ({"stretch": 2.0}, ["rope_parameters['stretch']", "leave it out", "original_max_position_embeddings"]),
    ({"full_attention": {"rope_theta": 1e4}}, ["rope_parameters['full_attention']", "leave it out"]),
    ({"rope_type": "linear"}, ["linear", "factor", "add them"]),
    ({"rope_type": "ntk"}, ["ntk", "factor", "add them"]),
    ({"rope_type": "ntk", "factor": 2.0, "partial_rotary_factor": 0.25}, ["ntk", "with 2 rotary", "single frequency"]),
    ({"rope_type": "llama3", "factor": 2.0}, ["low_freq_factor", "high_freq_factor"]),
    ({"rope_type": "su"}, ["rope_parameters['rope_type']='su'", "allowed", "longrope"]),
    ({"rope_theta": None}, ["rope_parameters['rope_theta']=None", "positive number"]),
    ({"rope_theta": 0}, ["rope_parameters['rope_theta']=0"]),
    ({"rope_theta": -1e4}, ["rope_parameters['rope_theta']=-10000.0"]),
    ({"rope_theta": "1e4"}, ["rope_parameters['rope_theta']='1e4'"]),
    ({"rope_theta": math.inf}, ["rope_parameters['rope_theta']=inf"]),
    ({"rope_type": "linear", "factor": 0.0}, ["rope_parameters['factor']=0.0"]),
    ({"rope_type": "ntk", "factor": "2"}, ["rope_parameters['factor']='2'"]),
    ({"partial_rotary_factor": -0.5}, ["rope_parameters['partial_rotary_factor']=-0.5"]),
    ({"partial_rotary_factor": 0.1}, ["head_dim=8", "['partial_rotary_factor']=0.1", "0 rotary"]),
    ({"partial_rotary_factor": 0.4}, ["head_dim=8", "3 rotary", "multiple of 2"]),
    ({"partial_rotary_factor": 1.5}, ["head_dim=8", "12 rotary", "at most `head_dim`"]),
    (
        {"rope_type": "longrope", "factor": 2.0, "short_factor": [1.0] * 4, "long_factor": [1.0] * 3},
        ["rope_parameters['long_factor']", "list of 4 numbers", "head_dim=8"],
    ),
]


@pytest.mark.parametrize(("rope", "words"), ROPE_WORDS, ids=lambda part: str(part)[:60])
@pytest.mark.parametrize("spelling", ["rope_parameters", "rope_scaling"])
def test_rope_that_cannot_be_is_refused(rope, words, spelling):
    message = message_of(lambda: tiny_config(**{spelling: rope}))
    assert all(word in message for word in words), message


@pytest.mark.parametrize("key", FOREIGN_ROPE_KEYS)
def test_foreign_keys_of_rope_are_refused_by_name(key):
    message = message_of(lambda: tiny_config(rope_parameters={key: 2.0}))
    assert f"did you mean `{FOREIGN_ROPE_KEYS[key]}`" in message


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, ["rope_2d=True", "partial_rotary_factor"]),
        ({"head_dim": 6}, ["head_dim=6", "multiple of 4", "rope_2d=True"]),
        *(
            ({"rope_parameters": {"rope_type": kind, "factor": 2.0}}, ["rope_2d=True", f"rope_type='{kind}'"])
            for kind in sorted(set(ROPE_KEYS) - {"default", "linear", "ntk"})
        ),
    ],
    ids=str,
)
def test_rope_on_two_axes_refuses(fields, words):
    message = message_of(lambda: tiny_config(rope_2d=True, **fields))
    assert all(word in message for word in words), message


@pytest.mark.parametrize(
    "fields",
    [
        {"rope_theta": 5e5},
        {"rope_scaling": {"type": "linear", "factor": 2.0}},
        {"rope_parameters": {"rope_type": "default"}},
        {"partial_rotary_factor": 0.5},
    ],
    ids=lambda fields: next(iter(fields)),
)
@pytest.mark.parametrize("positions", ["alibi", "sandwich", "learned", "sinusoidal", "glm_2d", "none"])
def test_rope_without_rope_is_refused(positions, fields):
    message = message_of(lambda: tiny_config(position_embedding_type=positions, **fields))
    assert f"`{next(iter(fields))}`" in message and f"position_embedding_type='{positions}'" in message
    assert "set `position_embedding_type='rope'`" in message


LISTS = {"short_factor": [1.0, 1.1, 1.2, 1.3], "long_factor": [1.5, 2.0, 2.5, 3.0]}
SPELLINGS = [
    {},
    {"rope_theta": 5e5},
    {"rope_theta": 500000},
    {"rope_parameters": {"rope_theta": 5e5}},
    {"rope_scaling": {"type": "linear", "factor": 2.0}},
    {"rope_scaling": {"rope_type": "linear", "factor": 2.0}, "rope_theta": 5e5},
    {"rope_scaling": {"type": "dynamic", "factor": 2.0}, "rope_theta": 5e5},
    {"rope_scaling": None, "rope_theta": 5e5},
    {"rope_parameters": {"rope_type": "linear", "factor": 2.0}, "rope_theta": 5e5},
    {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 5e5}, "rope_theta": 5e5},
    {"rope_parameters": {"rope_type": "yarn", "factor": 2.0}, "rope_theta": 5e5},
    {"rope_scaling": {"type": "yarn", "factor": 2.0, "original_max_position_embeddings": 16}},
    {"rope_scaling": {"type": "longrope", "factor": 2.0, **LISTS}, "rope_theta": 5e5},
    {"rope_theta": 5e5, "partial_rotary_factor": 0.5},
    {"rope_parameters": {"partial_rotary_factor": 0.5}},
]


@pytest.mark.parametrize("fields", SPELLINGS, ids=str)
def test_spellings_of_rope_mean_what_llama_makes_of_them(fields):
    given = copy.deepcopy(fields)
    config = tiny_config(**given)
    assert given == fields, "the caller's dictionary was changed"
    sizes = {"hidden_size": 32, "num_attention_heads": 4, "max_position_embeddings": 32}
    expected = LlamaConfig(**sizes, **copy.deepcopy(fields)).rope_parameters
    assert config.rope_parameters == expected
    if "5" in str(fields.get("rope_theta")):
        assert config.rope_parameters["rope_theta"] == 5e5
    # Read back, it is the same again.
    assert MiniLLMConfig.from_dict(config.to_dict()).rope_parameters == expected


def test_equal_spellings_are_equal():
    spellings = [
        {"rope_theta": 5e5, "rope_scaling": {"rope_type": "linear", "factor": 2.0}},
        {"rope_theta": 5e5, "rope_parameters": {"rope_type": "linear", "factor": 2.0}},
        {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 5e5}},
    ]
    assert len({tiny_config(**fields).to_json_string() for fields in spellings}) == 1


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        (
            {"rope_theta": 5e5, "rope_parameters": {"rope_theta": 7e5}},
            ["rope_theta=500000.0", "rope_parameters['rope_theta']=700000.0"],
        ),
        (
            {"partial_rotary_factor": 1.0, "rope_parameters": {"partial_rotary_factor": 0.5}},
            ["partial_rotary_factor=1.0", "rope_parameters['partial_rotary_factor']=0.5"],
        ),
        (
            {"rope_parameters": {"rope_theta": 5e5}, "rope_scaling": {"type": "linear", "factor": 2.0}},
            ["rope_scaling=", "rope_parameters=", "give `rope_parameters` alone"],
        ),
    ],
    ids=str,
)
def test_two_spellings_that_differ_are_refused(fields, words):
    message = message_of(lambda: tiny_config(**fields))
    assert all(word in message for word in words), message


def test_a_base_assigned_later_is_not_ignored():
    config = tiny_config()
    config.rope_theta = 5e5
    with pytest.raises(ValueError, match=r"rope_theta=500000.0.*rope_parameters\['rope_theta'\]"):
        MiniLLMForCausalLM(config)
