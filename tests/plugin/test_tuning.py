"""The numbers that decide how work is done: what may be set, what the documentation says, and a stranger's copy."""

import ast
import copy
import pickle
import re
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from stranger_cases import tiny, visit

from minillm import MiniLLMForCausalLM
from minillm.tuning import Tuning, tuning

PAGE = Path(__file__).parents[2] / "docs" / "performance.md"


def test_every_model_has_the_object_of_the_process():
    model = tiny()
    assert model.tuning is model.model.tuning is MiniLLMForCausalLM.tuning is tuning


@pytest.mark.parametrize(("name", "hint"), [("use_ligr", "did you mean 'use_liger'"), ("verbose", "there are chunk_")])
def test_an_unknown_name_is_refused(name, hint):
    with pytest.raises(AttributeError, match=f"has no '{name}': {hint}"):
        setattr(tuning, name, True)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("use_liger", 0),
        ("growing_elements", -1),
        ("least_room", 64.0),
        ("blocks_from", True),
        ("kept_elements", None),
        ("folding_devices", "cuda"),
        ("folding_devices", ("cuda", 0)),
        ("chunk_logits", 2**20),
        ("chunk_logits", {"cpu": 2**20}),
        ("chunk_logits", {"cpu": -1, "cuda": 2**20}),
        ("longest_fold", {"bfloat16": 2**16}),
        ("longest_fold", {torch.bfloat16: -1}),
    ],
)
def test_a_value_of_the_wrong_kind_is_refused(name, value):
    before = getattr(tuning, name)
    with pytest.raises(ValueError, match=re.escape(f"`tuning.{name} = {value!r}`: it must be ")):
        setattr(tuning, name, value)
    assert getattr(tuning, name) is before


def test_an_entry_of_a_mapping_is_not_set_behind_the_check():
    given = {"cuda": 4}
    own = Tuning(chunk_logits=given)
    given["cuda"] = -4
    assert own.chunk_logits == {"cuda": 4}
    with pytest.raises(TypeError):
        own.chunk_logits["cuda"] = -4


def read_default(text):
    """A number, `True`, a tuple or a mapping as the page writes it: with powers, and torch's dtypes by name."""
    text = re.sub(r"(\d+)\*\*(\d+)", lambda power: str(int(power[1]) ** int(power[2])), text)
    plain = ast.literal_eval(re.sub(r"torch\.(\w+)", r"'torch.\1'", text))
    if isinstance(plain, dict):
        return {getattr(torch, key[6:]) if key.startswith("torch.") else key: value for key, value in plain.items()}
    return plain


def test_the_page_lists_every_field_with_its_default():
    section = PAGE.read_text("utf-8").split("## Settings of a process\n")[1].split("\n## ")[0]
    told = {name: read_default(default) for name, default in re.findall(r"^\| `(\w+)` \| `(.+?)` \|", section, re.M)}
    assert list(told) == [field.name for field in fields(Tuning)]
    assert told == {field.name: getattr(Tuning(), field.name) for field in fields(Tuning)}


@pytest.mark.slow
def test_a_setting_holds_in_a_strangers_copy(tmp_path):
    tiny().save_pretrained(tmp_path / "model")
    case = {"name": "model", "folder": str(tmp_path / "model"), "auto_class": "tuning"}
    assert visit([case], tmp_path) == {"model": "set"}


def test_no_other_object_takes_its_place():
    model = tiny()
    with pytest.raises(AttributeError, match="one object for all models"):
        model.tuning = Tuning()
    assert model.tuning is tuning


def test_settings_are_copied_and_pickled():
    settings = Tuning(least_room=7, chunk_logits={"cpu": 5, "cuda": 6})
    for other in (copy.copy(settings), copy.deepcopy(settings), pickle.loads(pickle.dumps(settings))):
        assert other == settings and other is not settings
        with pytest.raises(AttributeError, match="least_room"):
            other.least_rom = 1
