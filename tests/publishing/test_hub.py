"""What saving writes, and clear errors for folders that are damaged."""

import json
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from stranger_cases import tiny
from transformers import AutoModelForCausalLM, GenerationConfig

import minillm
from minillm import MiniLLMConfig, MiniLLMForCausalLM
from minillm.publishing.hub import AUTO_MAP, install


def test_auto_map_names_every_public_model_class(tmp_path):
    tiny().save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text("utf-8"))["auto_map"]
    assert written == AUTO_MAP
    named = {value.partition(".")[2] for value in AUTO_MAP.values()}
    public = {name for name in minillm.__all__ if name.startswith(("MiniLLMFor", "MiniLLMModel", "MiniLLMConfig"))}
    assert named == public


def test_install_wraps_once():
    before = MiniLLMConfig.save_pretrained
    install()
    assert MiniLLMConfig.save_pretrained is before


@pytest.mark.parametrize(("pad", "eos", "expected"), [(None, 2, (2, 2)), (0, 2, (2, 0)), (None, [2, 3], ([2, 3], 2))])
def test_generation_config_has_eos_and_pad(tmp_path, pad, eos, expected):
    tiny(pad_token_id=pad, eos_token_id=eos).save_pretrained(tmp_path)
    saved = GenerationConfig.from_pretrained(tmp_path)
    assert (saved.eos_token_id, saved.pad_token_id) == expected


def test_card_says_what_the_model_is(tmp_path):
    model = tiny(attention_type="prefix", position_embedding_type="alibi")
    model.save_pretrained(tmp_path)
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.library_name == "transformers"
    assert card.data.pipeline_tag == "text-generation"
    assert card.data.license == "apache-2.0"
    assert {"minillm", "prefix", "alibi"} <= set(card.data.tags)
    assert f"{model.num_parameters():,}" in card.text
    assert "both directions" in card.text and "ALiBi" in card.text and "trust_remote_code=True" in card.text


def test_a_card_of_ones_own_is_kept(tmp_path):
    (tmp_path / "README.md").write_text("mine", "utf-8")
    tiny().save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text("utf-8") == "mine"


@pytest.fixture
def saved(tmp_path) -> Path:
    tiny().save_pretrained(tmp_path)
    return tmp_path


def edit_config(folder: Path, **fields) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text("utf-8")) | fields), "utf-8")


def test_truncated_weights(saved):
    path = saved / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(Exception, match=r"(?i)incomplete|invalid|header|safetensor|EOF"):
        AutoModelForCausalLM.from_pretrained(saved)


def test_tampered_header(saved):
    path = saved / "model.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[:8] + b"x" * 20 + data[28:])
    with pytest.raises(Exception, match=r"(?i)header|invalid"):
        AutoModelForCausalLM.from_pretrained(saved)


def test_missing_weights(saved):
    (saved / "model.safetensors").unlink()
    with pytest.raises(OSError, match=r"model\.safetensors"):
        AutoModelForCausalLM.from_pretrained(saved)


def test_wrong_shape(saved):
    edit_config(saved, intermediate_size=64)
    with pytest.raises(RuntimeError, match=r"(?i)mismatch|size|shape"):
        AutoModelForCausalLM.from_pretrained(saved)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"attention_type": "casual"}, "attention_type"),
        ({"schema_version": 99}, "pip install -U minillm-hf"),
    ],
    ids=["unknown-value", "newer-schema"],
)
def test_wrong_config_key(saved, fields, words):
    edit_config(saved, **fields)
    with pytest.raises(Exception, match=words):
        AutoModelForCausalLM.from_pretrained(saved)


def test_saved_equals_loaded_for_base_model_and_heads(tmp_path):
    for cls in (minillm.MiniLLMModel, minillm.MiniLLMForTokenClassification, MiniLLMForCausalLM):
        model = tiny(cls)
        model.save_pretrained(tmp_path / cls.__name__)
        again = cls.from_pretrained(tmp_path / cls.__name__)
        for (name, one), (other_name, other) in zip(
            model.state_dict().items(), again.state_dict().items(), strict=True
        ):
            assert name == other_name and torch.equal(one, other), name
