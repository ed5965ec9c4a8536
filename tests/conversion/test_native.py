"""Families that transformers ships, each against transformers' own class: logits, gradients, text, both directions."""

import functools

import pytest
import torch
from native_families import CASES, VOCAB, native_model
from transformers import AutoModelForCausalLM

from minillm.conversion import FAMILIES, export, load

each_case = pytest.mark.parametrize("name", CASES)
GREEDY = {"max_new_tokens": 32, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}


def assert_close(found, expected, what):
    difference = (found - expected).abs().max().item()
    assert difference <= 1e-5, f"{what}: off by {difference:.1e}"


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """`folders(case)`: the native model and its folder."""

    @functools.cache
    def make(name):
        model = native_model(name)
        folder = tmp_path_factory.mktemp(name) / CASES[name][0]
        model.save_pretrained(folder)
        return model, folder

    return make


def prompts():
    """Ids [3, 12] and their mask, two rows padded on the left."""
    ids = torch.randint(3, VOCAB, (3, 12), generator=torch.Generator().manual_seed(2))
    mask = torch.ones(3, 12, dtype=torch.long)
    mask[1, :5], mask[2, :1] = 0, 0
    return ids * mask, mask


def logits_of(model, **inputs):
    with torch.no_grad():
        return model(**inputs).logits


@each_case
def test_logits(name, folders):
    native, folder = folders(name)
    model = load(folder).eval()
    ids, mask = prompts()
    expected = logits_of(native, input_ids=ids)
    assert_close(logits_of(model, input_ids=ids), expected, "plain")
    # Padding on the left, then on the right.
    for padded, keep in ((ids, mask), (ids.flip(1), mask.flip(1))):
        # Stock GPT-2 counts padding as well, unless it is told the positions.
        positions = {"position_ids": (keep.cumsum(-1) - 1).clamp(min=0)} if name.startswith("gpt2") else {}
        expected = logits_of(native, input_ids=padded, attention_mask=keep, **positions)[keep.bool()]
        found = logits_of(model, input_ids=padded, attention_mask=keep)[keep.bool()]
        assert_close(found, expected, "padded")


def test_without_falcons_rounding_its_logits_are_missed(folders):
    """As the pages say; BLOOM rounds in its own dtype, which is no loss in float32."""
    native, folder = folders("falcon_alibi_twelve_heads")
    ids = prompts()[0]
    expected = logits_of(native, input_ids=ids)
    exact = load(folder, alibi_rounding="none").eval()
    assert 1e-4 < (logits_of(exact, input_ids=ids) - expected).abs().max() < 0.1


@each_case
def test_gradients(name, folders):
    """Those of the loss, brought into MiniLLM's names by the very rules that bring the weights."""
    native, folder = folders(name)
    model = load(folder)
    # Without the padding token, whose embedding some of these classes train and some do not.
    ids = prompts()[0].clamp(min=3)
    native.zero_grad()
    losses = [each(input_ids=ids, labels=ids).loss for each in (native, model)]
    assert losses[1].item() == pytest.approx(losses[0].item(), abs=1e-5)
    for loss in losses:
        loss.backward()
    theirs = {key: parameter.grad for key, parameter in native.named_parameters()}
    ours = {key: parameter.grad for key, parameter in model.named_parameters()}
    family = FAMILIES[CASES[name][0]]
    for mapping in family.mappings(model.config)[0]:
        if not set(mapping.native) <= set(theirs):
            # transformers holds the experts of a block in one tensor, as MiniLLM does, under its own name.
            assert "experts" in mapping.minillm[0] or "mlp.gate" in mapping.minillm[0]
            assert_close(ours[mapping.minillm[0]], theirs[mapping.minillm[0]], mapping.minillm[0])
            continue
        expected = mapping.transform.to_minillm([theirs[key] for key in mapping.native], model.config)
        for key, gradient in zip(mapping.minillm, expected, strict=True):
            assert_close(ours[key], gradient, key)


@each_case
def test_text_of_a_padded_batch_with_a_cache_and_without(name, folders):
    native, folder = folders(name)
    model = load(folder).eval()
    ids, mask = prompts()
    # MPT has no position beyond its length, and dynamic RoPE depends on the longest row.
    rows = [(ids, mask)] if "dynamic" not in name and "longrope" not in name else [(ids[:1], mask[:1])]
    for row, keep in rows:
        expected = native.generate(row, attention_mask=keep, **GREEDY)
        for options in ({}, {"use_cache": False}):
            if options and ("dynamic" in name or "longrope" in name):
                expected = native.generate(row, attention_mask=keep, **GREEDY, **options)
            assert torch.equal(model.generate(row, attention_mask=keep, **GREEDY, **options), expected)


@each_case
def test_bfloat16_is_no_farther_from_float32_than_the_reference(name, folders):
    native, folder = folders(name)
    ids, _ = prompts()
    truth = logits_of(native, input_ids=ids)
    theirs = logits_of(native_model(name, torch.bfloat16), input_ids=ids).float()
    ours = logits_of(load(folder, dtype=torch.bfloat16).eval(), input_ids=ids).float()
    error, allowed = (ours - truth).abs().mean(), (theirs - truth).abs().mean()
    assert error <= 1.5 * allowed, f"error {error:.4f}, the reference's own {allowed:.4f}"


@pytest.mark.mostly_thorough(
    "gpt2", "bloom_odd_heads", "llama_gqa_tied", "falcon_40b", "falcon_rw", "mpt_odd_heads", "glm", "mixtral"
)
@each_case
def test_in_and_out_and_in_changes_no_bit(name, folders, tmp_path):
    native, folder = folders(name)
    model = load(folder)
    model.save_pretrained(tmp_path / "ours")
    family = CASES[name][0]
    export(tmp_path / "ours", tmp_path / "native", family)
    back, info = AutoModelForCausalLM.from_pretrained(tmp_path / "native", output_loading_info=True)
    assert type(back) is type(native) and not info["missing_keys"] and not info["unexpected_keys"]
    expected = native.state_dict()
    assert all(torch.equal(value, expected[key]) for key, value in back.state_dict().items())
    written, original = back.config.to_dict(), native.config.to_dict()
    assert all(written[key] == value for key, value in original.items() if key in FAMILIES[family].keys and value)
    ids, mask = prompts()
    native_logits = logits_of(native, input_ids=ids, attention_mask=mask)
    assert torch.equal(logits_of(back.eval(), input_ids=ids, attention_mask=mask), native_logits)
    again = load(tmp_path / "native").state_dict()
    assert all(torch.equal(value, again[key]) for key, value in model.state_dict().items())
