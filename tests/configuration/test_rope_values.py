"""Every value inside `rope_parameters` is refused by name, or gives finite cosines and sines."""

import copy
import json
import math

import pytest
import torch
from matrix_cases import tiny_config
from native_families import ROPE_TYPES
from transformers.utils import logging

from minillm import MiniLLMConfig, MiniLLMForCausalLM
from minillm.configuration.rope_fields import ALL_ROPE_KEYS, COMMON_ROPE_KEYS, ROPE_KEYS
from minillm.rotary import MiniLLMRotaryEmbedding

# Rotary channels 8: four frequencies.
BASES = {**ROPE_TYPES, "ntk": {"factor": 2.0}}
NUMBERS = [
    *(math.nan, math.inf, -math.inf, 0, 0.0, -0.0, -1, -0.5, True, False, None),
    *(1, 2, 16, 0.5, 1.0, 1.5, 4.0, 10000, 5e5, 4.5e10, 1e-300, 1e-12, 1e-10, 1e6, 1e7, 1e16, 1e30, 1e300),
    *(2**63 - 1, 2**63, 10**400),
]
OTHERS = [
    *(
        "",
        "x",
        "2",
        "nan",
        "linear",
        "default",
        b"2",
        (),
        (1.0,) * 4,
        {},
        {"a": 1},
        {"rope_theta": 1e4},
        object(),
        set(),
    ),
    *([], [1.0], [1.0] * 3, [1.0] * 4, [2] * 4, [1.0] * 5, [[1.0] * 4], ["1"] * 4, [None] * 4, [True] * 4),
    *([value, 1.0, 1.0, 1.0] for value in (0.0, -1.0, math.nan, math.inf, 1e-300, 1e300, "1", [1.0])),
    *BASES,
    torch.tensor([1.0] * 4),
    torch.tensor(2.0),
]
VALUES = [*NUMBERS, *OTHERS]


def angles(config):
    """Cosines and sines within the length, beyond it, and far away."""
    rotary, x = MiniLLMRotaryEmbedding(config), torch.zeros(1)
    positions = torch.tensor([[0, 1, 7, 31, 32, 33, 100, 100_000]])
    for lengths in (5, 33, 100_001):
        by_length = {"lengths": torch.tensor([[lengths]])} if rotary.by_length else {}
        yield from rotary(x, positions, **by_length)


def outcome(rope):
    """What becomes of a dictionary: "refused" by name, or "finite". Anything else fails."""
    try:
        config = tiny_config(rope_parameters=rope)
    except ValueError as error:
        assert "rope_parameters[" in str(error), f"{rope}: {error}"
        return "refused"
    assert all(part.isfinite().all() for part in angles(config)), rope
    return "finite"


@pytest.mark.parametrize("rope_type", BASES)
@pytest.mark.parametrize("key", ALL_ROPE_KEYS)
def test_every_value_of_every_key_is_refused_by_name_or_works(rope_type, key):
    base = {"rope_type": rope_type, "rope_theta": 10000.0, **BASES[rope_type]}
    assert outcome(base) == "finite"
    found = {outcome({**base, key: value}) for value in VALUES}
    read = [*COMMON_ROPE_KEYS, *ROPE_KEYS[rope_type].split()]
    assert found == ({"refused", "finite"} if key in read else {"finite"})


@pytest.mark.slow
@pytest.mark.parametrize("rope_type", BASES)
def test_pairs_of_extreme_values_are_refused_by_name_or_work(rope_type):
    base = {"rope_type": rope_type, "rope_theta": 10000.0, **BASES[rope_type]}
    keys = [
        key for key in ["rope_theta", *ROPE_KEYS[rope_type].split()] if not key.endswith("_factor") or "freq" in key
    ]
    extremes = [1e-10, 0.5, 1, 1.0, 1 + 1e-9, 2, 1e6, 1e30, 2**63 - 1]
    for first in keys:
        for second in keys:
            for value in extremes:
                for other in extremes:
                    outcome({**base, first: value, second: other})


@pytest.mark.parametrize("rope_type", BASES)
def test_every_value_assigned_later_is_refused_by_name_or_works(rope_type):
    base = {"rope_type": rope_type, "rope_theta": 10000.0, **BASES[rope_type]}
    for key in base:
        for value in VALUES:
            for in_place in (True, False):
                config = tiny_config(rope_parameters=base)
                if in_place:
                    config.rope_parameters[key] = value
                else:
                    config.rope_parameters = {**base, key: value}
                try:
                    config.validate_architecture()
                except ValueError as error:
                    assert "rope_parameters[" in str(error), f"{key}={value!r}: {error}"
                    continue
                assert all(part.isfinite().all() for part in angles(config)), (key, value)


@pytest.mark.parametrize("rope_type", BASES)
@pytest.mark.parametrize("missing", sorted({key for base in BASES.values() for key in base}))
def test_a_missing_value_is_refused_or_has_a_default(rope_type, missing):
    rope = {"rope_type": rope_type, **BASES[rope_type]}
    if rope.pop(missing, None) is None:
        return
    if missing == "original_max_position_embeddings" or (rope_type, missing) == ("longrope", "factor"):
        assert outcome(rope) == "finite"
        return
    with pytest.raises(ValueError, match=f"{missing}.*add them"):
        tiny_config(rope_parameters=rope)


@pytest.mark.parametrize("key", ["rope_theta", "partial_rotary_factor", "rope_scaling"])
def test_every_value_of_an_old_spelling_is_refused_by_name_or_works(key):
    for value in VALUES:
        try:
            config = tiny_config(**{key: value})
        except ValueError as error:
            assert key in str(error) or "rope_parameters[" in str(error)
            continue
        assert all(part.isfinite().all() for part in angles(config)), value


def warnings_of(caplog):
    return [record.getMessage() for record in caplog.records if "does not read" in record.getMessage()]


@pytest.fixture
def fresh_warnings():
    """`warning_once` remembers what it said, over tests too."""
    logging.get_logger("minillm").warning_once.cache_clear()


@pytest.mark.parametrize("key", ["original_max_position_embeddings", "factor", "short_factor", "beta_fast"])
def test_a_key_that_another_type_reads_warns_once_and_stays(key, caplog, tmp_path, fresh_warnings):
    rope = {"rope_type": "default", "rope_theta": 10000.0, key: 16}
    config = tiny_config(rope_parameters=rope)
    MiniLLMForCausalLM(config).save_pretrained(tmp_path)
    read = MiniLLMConfig.from_pretrained(tmp_path)
    assert config.rope_parameters == read.rope_parameters == rope
    (line,) = warnings_of(caplog)
    assert f"['{key}']" in line and "rope_type='default'" in line
    assert not [record for record in caplog.records if "Unrecognized keys" in record.getMessage()]


def test_a_key_that_no_type_knows_is_refused_where_it_is_typed(tmp_path):
    tiny_config().save_pretrained(tmp_path)
    rope = {"rope_theta": 1e4, "rope_thetas": 5e5}
    for type_it in (
        lambda: tiny_config(rope_parameters=rope),
        lambda: tiny_config(rope_scaling=rope),
        lambda: setattr(tiny_config(), "rope_parameters", rope),
        lambda: tiny_config().update({"rope_parameters": rope}),
        lambda: MiniLLMConfig.from_pretrained(tmp_path, rope_parameters=rope),
        lambda: MiniLLMConfig.from_dict(tiny_config().to_dict(), rope_parameters=rope),
    ):
        with pytest.raises(ValueError, match=r"rope_parameters\['rope_thetas'\].*did you mean `rope_theta`"):
            type_it()


def test_a_key_that_no_type_knows_warns_in_a_saved_config(caplog, tmp_path, fresh_warnings):
    config = tiny_config()
    config.rope_parameters["stretch"] = 3
    config.save_pretrained(tmp_path)
    read = MiniLLMConfig.from_pretrained(tmp_path)
    assert read.rope_parameters["stretch"] == 3 and read.to_dict() == config.to_dict()
    MiniLLMForCausalLM(copy.deepcopy(read))
    (line,) = warnings_of(caplog)
    assert "['stretch']" in line


@pytest.mark.parametrize("key", ["base", "rotary_base", "full_attention"])
def test_a_saved_base_of_another_name_never_becomes_the_default_one(key, tmp_path):
    tiny_config().save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**written, "rope_parameters": {key: 5e5}}))
    with pytest.raises(ValueError, match=rf"rope_parameters\['{key}'\]"):
        MiniLLMConfig.from_pretrained(tmp_path)


@pytest.mark.parametrize("rope_type", ["linear", "dynamic", "yarn"])
def test_types_are_changed_in_place_as_transformers_tests_do(rope_type):
    """Its three tests of RoPE write one type after another into the same dictionary."""
    config = tiny_config()
    for change in ({"rope_type": rope_type, "factor": 10.0}, {"rope_type": "default"}):
        config.rope_parameters = config.rope_parameters or {}
        config.rope_parameters.update({"rope_theta": 10000.0, **change})
        model = MiniLLMForCausalLM(config)
        expected = {"rope_theta": 10000.0, "rope_type": change["rope_type"]}
        plain = change if rope_type != "yarn" else {**change, "original_max_position_embeddings": 32}
        wanted = tiny_config(rope_parameters={**expected, **plain})
        torch.testing.assert_close(next(angles(model.config)), next(angles(wanted)))


def test_an_assigned_base_is_never_lost_in_silence():
    config = tiny_config(rope_theta=5e5)
    config.rope_parameters = {"rope_type": "linear", "factor": 2.0}
    with pytest.raises(ValueError, match=r"rope_parameters\['rope_theta'\]=None` must be"):
        MiniLLMForCausalLM(config)
    config = tiny_config()
    config.rope_parameters = {"rope_type": "yarn", "factor": 2.0}
    assert MiniLLMForCausalLM(config).config.rope_parameters == {
        "rope_type": "yarn",
        "factor": 2.0,
        "rope_theta": 10000.0,
        "original_max_position_embeddings": 32,
    }
