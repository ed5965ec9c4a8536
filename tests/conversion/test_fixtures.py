"""Families that transformers does not ship, against what their public code computes: `tests/families/*/cases`.

Each folder holds a tiny checkpoint in the family's own key names, with the logits, losses and greedy tokens that the
reference code gave in float32.
"""

import functools
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from minillm.conversion import FAMILIES, detect, export, load
from minillm.infilling import glm_inputs

FOLDER = Path(__file__).parents[1] / "families"
FAMILY_OF = {
    "baichuan-7b": "baichuan",
    "baichuan-13b": "baichuan",
    "baichuan2-13b": "baichuan2",
    "chatglm2-6b": "chatglm2",
    "chatglm-6b": "chatglm",
    "glm-10b": "glm-infilling",
}
LEFT_TO_RIGHT = ("baichuan-7b", "baichuan-13b", "baichuan2-13b", "chatglm2-6b")
GREEDY = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}

each_fixture = pytest.mark.parametrize("name", FAMILY_OF)
each_causal = pytest.mark.parametrize("name", LEFT_TO_RIGHT)


def assert_close(found, expected, what):
    difference = (found - expected).abs().max().item()
    assert difference <= 1e-5, f"{what}: off by {difference:.1e}"


@functools.cache
def model_of(name):
    return load(FOLDER / name).eval()


@functools.cache
def cases_of(name):
    return load_file(FOLDER / name / "cases.safetensors")


def case(name, of):
    return {key.partition(".")[2]: value for key, value in cases_of(name).items() if key.partition(".")[0] == of}


def logits_of(model, *ids, **inputs):
    with torch.no_grad():
        return model(*ids, **inputs).logits


def in_pieces(model, ids, first, **inputs):
    """Logits of the tokens from `first` on, one at a time through the cache."""
    per_token = {key: value for key, value in inputs.items() if key != "attention_mask"}
    with torch.no_grad():
        outputs = model(ids[:, :first], use_cache=True, **{key: value[:, :first] for key, value in per_token.items()})
        found = []
        for at in range(first, ids.shape[1]):
            step = {key: value[:, at : at + 1] for key, value in per_token.items()}
            outputs = model(ids[:, at : at + 1], past_key_values=outputs.past_key_values, **step)
            found.append(outputs.logits)
    return torch.cat(found, dim=1)


@each_fixture
def test_family_is_detected(name):
    assert model_of(name).config.model_type == "minillm"
    raw = json.loads((FOLDER / name / "config.json").read_text("utf-8"))
    assert detect({**raw, "_name_or_path": name}).name == FAMILY_OF[name]


@each_causal
def test_logits_loss_cache_and_text(name):
    model, expected = model_of(name), case(name, "plain")
    ids = expected["input_ids"]
    assert_close(logits_of(model, ids), expected["logits"], "logits")
    with torch.no_grad():
        assert model(ids, labels=ids).loss.item() == pytest.approx(expected["loss"].item(), abs=1e-5)
    assert_close(in_pieces(model, ids, ids.shape[1] - 3), expected["cached_logits"], "cached")
    greedy = expected["greedy"]
    answer = model.generate(greedy[:, :5], max_new_tokens=greedy.shape[1] - 5, **GREEDY)
    assert torch.equal(answer, greedy)


@each_causal
def test_left_padding(name):
    model, expected = model_of(name), case(name, "leftpad")
    mask = expected["attention_mask"]
    logits = logits_of(model, expected["input_ids"], attention_mask=mask)
    assert_close(logits[mask.bool()], expected["logits"][mask.bool()], "logits")


def test_baichuan2_in_training_normalises_its_head_as_it_goes():
    expected = case("baichuan2-13b", "train")
    model = load(FOLDER / "baichuan2-13b").train()
    assert_close(logits_of(model, expected["input_ids"]), expected["logits"], "logits")
    # Clients that read the weight of the file see the rows that are used.
    assert_close(model.lm_head.raw_weight.norm(dim=-1), torch.ones(128), "rows")


def blanks_of(name):
    facts = json.loads((FOLDER / name / "cases.json").read_text("utf-8"))
    return [facts["gmask_token_id"], facts["mask_token_id"]], facts


@pytest.mark.parametrize("of", ["gmask_final", "gmask_early", "mask"])
def test_chatglm_from_token_ids_alone(of):
    """Mask and positions of the reference follow from the blank and the start token."""
    name = "chatglm-6b"
    model, expected = model_of(name), case(name, of)
    blanks, facts = blanks_of(name)
    counting = blanks[:1] if of == "gmask_early" else ()
    ids = expected["input_ids"]
    inputs = glm_inputs(ids, blanks, facts["bos_token_id"], counting_token_ids=counting)._asdict()
    positions = torch.stack((inputs["position_ids"], inputs["block_position_ids"]), dim=1)
    assert torch.equal(positions, expected["position_ids"])
    assert_close(logits_of(model, ids, **inputs), expected["logits"], "logits")
    with torch.no_grad():
        loss = model(ids, labels=expected["labels"], **inputs).loss.item()
    assert loss == pytest.approx(expected["loss"].item(), abs=1e-5)
    assert_close(in_pieces(model, ids, ids.shape[1] - 3, **inputs), expected["cached_logits"], "cached")
    greedy, start = expected["greedy"], facts["cases"][of]["prompt_length"] + 1
    given = {key: value[:, :start] for key, value in inputs.items()} if counting else {}
    answer = model.generate(greedy[:, :start], max_new_tokens=greedy.shape[1] - start, **GREEDY, **given)
    assert torch.equal(answer, greedy)


@pytest.mark.parametrize("of", ["mask", "gmask", "batch"])
def test_glm_from_token_ids_alone(of):
    name = "glm-10b"
    model, expected = model_of(name), case(name, of)
    blanks, facts = blanks_of(name)
    ids = expected["input_ids"]
    padding = expected["attention_mask"][:, 0].amax(1).long()
    inputs = glm_inputs(ids, blanks, facts["start_token_id"], padding)._asdict()
    positions = torch.stack((inputs["position_ids"], inputs["block_position_ids"]), dim=1)
    assert torch.equal(positions * padding[:, None], expected["position_ids"] * padding[:, None])
    inputs["attention_mask"] = padding
    logits = logits_of(model, ids, **inputs)
    assert_close(logits[padding.bool()], expected["logits"][padding.bool()], "logits")
    # The reference's labels are shifted already.
    with torch.no_grad():
        loss = model(ids, labels=ids, shift_labels=expected["labels"], **inputs).loss.item()
    assert loss == pytest.approx(expected["loss"].item(), abs=1e-5)
    if "cached_logits" in expected:
        cached = in_pieces(model, ids, ids.shape[1] - 3, **inputs)
        assert_close(cached, expected["cached_logits"], "cached")


@pytest.mark.parametrize("of", ["greedy_mask", "greedy_gmask"])
def test_glm_text(of):
    model, expected = load(FOLDER / "glm-10b").eval(), case("glm-10b", of)
    blanks, facts = blanks_of("glm-10b")
    prompt = torch.nn.functional.pad(expected["context"], (0, 1), value=facts["start_token_id"])
    model.config.gmask_token_id, model.config.mask_token_id = blanks
    model.config.sop_token_id = facts["start_token_id"]
    answer = model.generate(prompt, max_new_tokens=expected["generated"].shape[1], **GREEDY)
    assert torch.equal(answer[:, prompt.shape[1] :], expected["generated"])


@each_fixture
def test_in_and_out_and_in_changes_no_bit(name, tmp_path):
    model = model_of(name)
    model.save_pretrained(tmp_path / "ours")
    native_config = export(tmp_path / "ours", tmp_path / "native", FAMILY_OF[name])
    theirs, back = load_file(FOLDER / name / "model.safetensors"), load_file(tmp_path / "native" / "model.safetensors")
    assert theirs.keys() == back.keys()
    head_is_rewritten = FAMILY_OF[name] == "baichuan2"
    assert [key for key in theirs if not torch.equal(theirs[key], back[key])] == ["lm_head.weight"] * head_is_rewritten
    raw = json.loads((FOLDER / name / "config.json").read_text("utf-8"))
    written = json.loads((tmp_path / "native" / "config.json").read_text("utf-8"))
    assert written == json.loads(json.dumps(native_config))
    family = FAMILIES[FAMILY_OF[name]]
    compared = [key for key in raw if key in family.keys or key in family.required]
    assert {key: written[key] for key in compared} == {key: raw[key] for key in compared}
    again = load(tmp_path / "native", family=FAMILY_OF[name]).state_dict()
    assert all(torch.equal(value, again[key]) for key, value in model.state_dict().items())
