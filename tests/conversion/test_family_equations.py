"""Families that transformers does not ship, against their equations in float64: gradients, padding, cache, text.

`tests/conversion/test_fixtures.py` holds the same models to what the families' public code computed.
"""

import functools
import json

import pytest
import torch
from family_equations import (
    FAMILY_OF,
    FOLDER,
    LOOKS_BOTH_WAYS,
    RECORDED,
    SECOND_AXIS,
    Equations,
    Text,
    blank_text,
    draw_folder,
)
from safetensors.torch import load_file

from minillm.conversion import FAMILIES, detect, export, load

LENGTHS, NEW = (12, 7, 11), 32
each_model = pytest.mark.parametrize("name", FAMILY_OF)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """`models(name)`: the equations, MiniLLM's model in float64, and the checkpoint that both were read from."""

    @functools.cache
    def make(name):
        folder = FOLDER / name
        if name not in RECORDED:
            folder = tmp_path_factory.mktemp("drawn") / name
            draw_folder(name, folder)
        model = load(folder, family=FAMILY_OF[name], dtype=torch.float64).eval()
        if name == "glm-10b":
            # Its config.json names no tokens.
            model.config.gmask_token_id, model.config.mask_token_id = 125, 124
            model.config.sop_token_id = 126
        return Equations(name, folder), model, folder

    return make


def facts_of(name):
    return json.loads((FOLDER / name / "cases.json").read_text("utf-8"))


def texts_of(name, behind=(4, 2, 3)):
    """Three texts of different lengths; `behind` of their tokens are the start of a blank and what fills it."""
    generator = torch.Generator().manual_seed(5)
    texts = []
    for length, fill in zip(LENGTHS, behind, strict=True):
        ids = torch.randint(3, 120, (length,), generator=generator).tolist()
        if name not in SECOND_AXIS:
            texts.append(Text(ids, length - fill if name in LOOKS_BOTH_WAYS else 0))
            continue
        facts = facts_of(name)
        start = facts.get("start_token_id", facts.get("bos_token_id"))
        blank, place = (facts["gmask_token_id"], length - fill - 1) if length == 11 else (facts["mask_token_id"], 2)
        ids[place], ids[length - fill] = blank, start
        texts.append(blank_text(ids, blank, start))
    return texts


def batch_of(texts, side, name):
    """The arguments of `forward`, labels included, with padding on one side."""
    width = max(len(text.ids) for text in texts)

    def padded(rows, value):
        pads = [[value] * (width - len(row)) for row in rows]
        return torch.tensor([pad + row if side == "left" else row + pad for pad, row in zip(pads, rows, strict=True)])

    rows = [text.ids for text in texts]
    begins = [max(text.prefix, 1) if text.first is None else text.prefix + 1 for text in texts]
    scored = [[-100] * begin + row[begin:] for begin, row in zip(begins, rows, strict=True)]
    batch = {"input_ids": padded(rows, 0), "labels": padded(scored, -100)}
    batch["attention_mask"] = padded([[1] * len(row) for row in rows], 0)
    if name in LOOKS_BOTH_WAYS:
        prefixes = [[int(at < text.prefix) for at in range(len(text.ids))] for text in texts]
        batch["prefix_mask"] = padded(prefixes, 0)
    if name in SECOND_AXIS:
        batch["position_ids"] = padded([text.first for text in texts], 0)
        batch["block_position_ids"] = padded([text.second for text in texts], 0)
    return batch


def largest(found, expected):
    return (found - expected).abs().max().item()


def recorded_texts(name):
    """Each text of the recorded cases without its padding, and the logits that the public code gave for it."""
    tensors = load_file(FOLDER / name / "cases.safetensors")
    facts = facts_of(name)
    blanks = {facts.get("mask_token_id"), facts.get("gmask_token_id")}
    for key in sorted(key for key in tensors if key.endswith(".logits")):
        of = key.removesuffix(".logits")
        ids, mask = tensors[f"{of}.input_ids"], tensors.get(f"{of}.attention_mask")
        kept = torch.ones_like(ids) if mask is None else mask
        if kept.ndim == 4:
            # GLM marks what is seen, ChatGLM what is hidden, and pads nothing.
            kept = mask[:, 0].amax(1) if name == "glm-10b" else torch.ones_like(ids)
        for row, real, logits in zip(ids, kept.bool(), tensors[key], strict=True):
            row = row[real].tolist()
            if name in SECOND_AXIS:
                start = facts.get("start_token_id", facts.get("bos_token_id"))
                blank = next(token for token in row if token in blanks)
                yield blank_text(row, blank, start, counts=of == "gmask_early"), logits[real]
            else:
                yield Text(row), logits[real]


@pytest.mark.parametrize("name", RECORDED)
def test_the_equations_are_what_the_public_code_computed(name):
    """So that the equations may judge where nothing is recorded: gradients, longer texts, other batches."""
    equations, errors = Equations(name, FOLDER / name), []
    for text, logits in recorded_texts(name):
        with torch.no_grad():
            errors.append(largest(equations.logits(text), logits))
    assert len(errors) >= 3 and max(errors) <= 1e-5, errors


@pytest.mark.parametrize("side", ["left", "right"])
@each_model
def test_logits_loss_and_gradients_of_a_padded_batch(name, side, models):
    """Gradients are brought into MiniLLM's names by the very rules that bring the weights."""
    equations, model, _ = models(name)
    texts = texts_of(name)
    batch = batch_of(texts, side, name)
    # GLM-130B shrinks the gradient of its embedding, in training only; GLM's config asks for dropout there.
    model.train(name == "glm-130b").zero_grad()
    output = model(**batch)
    model.eval()
    found = output.logits[batch["attention_mask"].bool()]
    expected = torch.cat([equations.logits(text) for text in texts])
    assert largest(found, expected) <= 1e-5
    loss = equations.loss(texts)
    assert output.loss.item() == pytest.approx(loss.item(), abs=1e-5)
    output.loss.backward()
    theirs = dict(zip(equations.weights, torch.autograd.grad(loss, equations.weights.values()), strict=True))
    ours = {key: parameter.grad for key, parameter in model.named_parameters()}
    seen = set()
    for mapping in FAMILIES[FAMILY_OF[name]].mappings(model.config)[0]:
        gradients = [theirs[key] for key in mapping.native]
        if mapping.native != ("lm_head.weight",):
            # The rule of a normalised head would normalise its gradient.
            gradients = mapping.transform.to_minillm(gradients, model.config)
        for key, gradient in zip(mapping.minillm, gradients, strict=True):
            # Without RoPE the bias of the keys adds the same to all scores of a query.
            assert gradient.abs().max() > 1e-4 or key.endswith("k_proj.bias"), f"{key}: nothing to compare"
            assert largest(ours[key], gradient) <= 1e-5, key
            seen.add(key)
    assert seen == ours.keys()


@pytest.mark.parametrize("use_cache", [True, False], ids=["cached", "uncached"])
@each_model
def test_32_tokens_of_a_batch_with_padding(name, use_cache, models):
    """Prompts end at the start token; each token and the logits that it was taken from."""
    equations, model, _ = models(name)
    behind = (1, 1, 1) if name in SECOND_AXIS else (0, 0, 0)
    assert_continues(equations, model, texts_of(name, behind), use_cache)


@pytest.mark.parametrize("use_cache", [True, False], ids=["cached", "uncached"])
def test_32_tokens_of_glm_130b_behind_its_marks(use_cache, models, monkeypatch):
    """What fills [MASK] stands where that is, what goes on after [gMASK] counts on."""
    equations, model, _ = models("glm-130b")
    for key, token in {"mask_token_id": 124, "gmask_token_id": 125, "sop_token_id": 126}.items():
        monkeypatch.setattr(model.config, key, token)
    texts = [
        blank_text([9, 31, 124, 40, 57, 12, 66, 126], blank=124, start=126),
        blank_text([17, 23, 80, 125, 126], blank=125, start=126, counts=True),
    ]
    assert_continues(equations, model, texts, use_cache)


def assert_continues(equations, model, texts, use_cache):
    batch = batch_of(texts, "left", None)
    options = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    answer = model.generate(
        batch["input_ids"],
        attention_mask=batch["attention_mask"],
        use_cache=use_cache,
        output_logits=True,
        return_dict_in_generate=True,
        **options,
    )
    found = torch.stack(answer.logits, dim=1)
    for text, tokens, logits in zip(texts, answer.sequences[:, -NEW:].tolist(), found, strict=True):
        expected_tokens, expected = equations.continued(text, NEW)
        assert tokens == expected_tokens
        # As in Llama, RMSNorm and RoPE's tables are in float32, which shows at later positions.
        assert largest(logits, expected) <= 5e-5


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in FAMILY_OF if name not in RECORDED])
def test_a_drawn_checkpoint_comes_in_and_goes_out(name, models, tmp_path):
    _, _, folder = models(name)
    family = FAMILY_OF[name]
    assert detect(json.loads((folder / "config.json").read_text("utf-8"))).name == family
    load(folder).save_pretrained(tmp_path / "ours")
    export(tmp_path / "ours", tmp_path / "back", family)
    theirs, back = load_file(folder / "model.safetensors"), load_file(tmp_path / "back" / "model.safetensors")
    if family == "baichuan2":
        # As the reference does at its first evaluation.
        theirs["lm_head.weight"] = torch.nn.functional.normalize(theirs["lm_head.weight"])
        torch.testing.assert_close(back.pop("lm_head.weight"), theirs.pop("lm_head.weight"), atol=1e-7, rtol=0)
    assert back.keys() == theirs.keys() and all(torch.equal(back[key], theirs[key]) for key in theirs)
