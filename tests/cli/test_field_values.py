"""FIELD=VALUE pairs, which `train`, `convert` and `export` read by the types of the fields."""

from typing import Any, Literal

import pytest
import torch
from cli_cases import fail
from transformers.trainer_utils import SchedulerType

from minillm import MiniLLMConfig
from minillm.cli.config_settings import OPEN_TO_A_MODEL, config_hints, read_settings, require_open
from minillm.cli.field_values import read_pairs, read_value
from minillm.cli.training_options import FLAGS, OURS, read_trainer_fields


@pytest.mark.parametrize(
    ("text", "hint", "value"),
    [
        ("7", int, 7),
        ("1e-5", float | int, 1e-5),
        ("8", float | int, 8),
        ("8", float, 8.0),
        ("none", int | None, None),
        ("Null", float | None, None),
        ("true", bool, True),
        ("False", str | bool, False),
        ("no", str | bool, "no"),
        ("none", Literal["none", "bloom"], "none"),
        ("2", Literal[1, 2], 2),
        ("[1, 2]", list[int] | None, [1, 2]),
        ("[q_proj]", None | str | list[str], ["q_proj"]),
        ("q_proj", None | str | list[str], "q_proj"),
        ("{factor: 2.0, rope_type: linear}", dict | None, {"factor": 2.0, "rope_type": "linear"}),
        ('{"a": true}', dict[str, Any] | str | None, {"a": True}),
        ("cosine", SchedulerType | str, SchedulerType.COSINE),
        ("a=b", str, "a=b"),
    ],
)
def test_a_text_becomes_a_value_of_the_fields_type(text, hint, value):
    found = read_value(text, hint)
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize(
    ("text", "hint"),
    [
        ("7.5", int),
        ("true", int),
        ("1", bool),
        ("yes", bool),
        ("nan", float),
        ("-inf", float | int),
        ("rope2", Literal["rope", "alibi"]),
        ("[a]", list[int]),
        ("1", list[int] | None),
        ("{a: ", dict),
        ("", int | None),
    ],
)
def test_a_value_of_another_type_is_refused(text, hint):
    with pytest.raises(ValueError):
        read_value(text, hint)


def test_every_field_of_the_config_reads_back_what_it_holds():
    config = MiniLLMConfig(turn_token_ids=[3, 4], attention_type="prefix", answer_start_token_id=4)
    for name, hint in config_hints().items():
        value = getattr(config, name, None)
        if isinstance(value, (int, float, str, type(None))) and not isinstance(hint, str) and hint is not Any:
            assert read_pairs([f"{name}={value}"], "--set", {name: hint}, "it") == {name: value}, name


def test_the_last_of_two_counts_and_faults_are_named():
    assert read_settings(["hidden_size=8", "hidden_size=16"]) == {"hidden_size": 16}
    for pair, words in (
        ("hidden_size", "must be FIELD=VALUE with a field of MiniLLMConfig"),
        ("hiden_size=8", "'hiden_size' is none: did you mean 'hidden_size'?"),
        ("hidden_size=wide", "hidden_size must be int"),
        ("norm_type=batch", "norm_type must be rmsnorm or layernorm"),
        ("schema_version=0", "'schema_version' is none"),
    ):
        with pytest.raises(ValueError, match=words.replace("?", r"\?")):
            read_settings([pair])


def test_fields_open_to_a_model_change_no_weight():
    """Two models that differ in them alone have the same weights and, in evaluation, the same logits."""
    shape = {"vocab_size": 16, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "pad_token_id": 0}
    other = {
        "attention_dropout": 0.5,
        "hidden_dropout": 0.5,
        "embedding_dropout": 0.5,
        "embedding_gradient_scale": 0.1,
    }
    other |= {"use_cache": False, "skip_logits": True, "bos_token_id": 3, "eos_token_id": 4, "pad_token_id": 5}
    assert set(other) <= OPEN_TO_A_MODEL <= set(config_hints())
    from minillm import MiniLLMForCausalLM

    logits = []
    for fields in ({}, other):
        torch.manual_seed(0)
        model = MiniLLMForCausalLM(MiniLLMConfig(**{**shape, **fields})).eval()
        logits.append(model(torch.arange(6, 14)[None]).logits)
    assert torch.equal(*logits)
    for name in ("hidden_size", "rope_parameters", "norm_eps", "hidden_act", "initializer_range", "attention_type"):
        with pytest.raises(ValueError, match=f"--set {name}: with --model"):
            require_open([name])


def test_fields_of_the_trainer_that_a_flag_or_the_command_sets_are_refused():
    assert read_trainer_fields(["max_grad_norm=0.5", "adam_beta2=0.95", "neftune_noise_alpha=none"]) == {
        "max_grad_norm": 0.5,
        "adam_beta2": 0.95,
        "neftune_noise_alpha": None,
    }
    for name, flag in FLAGS.items():
        with pytest.raises(ValueError, match=f"there is a flag for it, {flag}"):
            read_trainer_fields([f"{name}=1"])
    for name in (*OURS, "hub_token"):
        with pytest.raises(ValueError, match="cannot be set"):
            read_trainer_fields([f"{name}=1"])
    # An abbreviation is none.
    with pytest.raises(ValueError, match="did you mean 'max_grad_norm'"):
        read_trainer_fields(["max_grad=3"])


@pytest.mark.parametrize("command", ["convert", "export"])
def test_other_commands_read_them_the_same_way(command, tmp_path):
    arguments = {
        "convert": ("convert", "--from", "nowhere", "--to", tmp_path / "out"),
        "export": ("export", "nowhere", tmp_path / "out", "--as", "llama"),
    }[command]
    told = fail(*arguments, "--set", "norm_eps=small")
    assert "norm_eps must be float or int" in told and not (tmp_path / "out").exists()
