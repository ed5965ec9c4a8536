"""Which back end serves which variant, where: the whole table against a rule written a second time, and every way of
choosing a back end against the table."""

import itertools
import json
from typing import NamedTuple

import pytest
import torch
from matrix_cases import batch, loud_model, real_tokens, tiny_config
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
)
from variants import variants

from minillm import MiniLLMConfig, MiniLLMForCausalLM, MiniLLMForSequenceClassification, MiniLLMModel
from minillm.capabilities import DIRECTIONS, KINDS, check, refusal
from minillm.cli.inspection import refusal_reasons, served

KNOWN = (
    "eager",
    "sdpa",
    "minillm_blocks",
    "flex_attention",
    "flash_attention_2",
    "flash_attention_3",
    "flash_attention_4",
)
ENGINES = ("vllm", "sglang", "paged")
PAGED = (*ENGINES, "paged|sdpa", "paged|eager")
UNKNOWN = ("kernels-community/x", "kernels-community/flash-attn2", "my_kernel")
DEVICES = ("cpu", "cuda")
POSITION_KINDS = variants("rope rope_dynamic rope_2d alibi sandwich learned sinusoidal glm_2d none")


class Variant(NamedTuple):
    attention_type: str
    positions: str
    window: int | None
    dropout: float
    documents: bool

    def config(self, **fields):
        return tiny_config(
            attention_type=self.attention_type,
            sliding_window=self.window,
            attention_dropout=self.dropout,
            **POSITION_KINDS[self.positions],
            **fields,
        )


VARIANTS = [
    Variant(*choice)
    for choice in itertools.product(
        ("causal", "prefix", "bidirectional"), POSITION_KINDS, (None, 3), (0.0, 0.1), (False, True)
    )
]


def can_serve(variant, back_end, device, direction):
    """The rule in words: see the README's table."""
    has_bias = variant.positions in ("alibi", "sandwich")
    if back_end in ("eager", "sdpa", "minillm_blocks"):
        return True
    if back_end == "flex_attention":
        if variant.dropout and direction == "backward":
            return False
        return device == "cuda" or direction == "forward"
    if back_end in ("flash_attention_2", "flash_attention_3", "flash_attention_4"):
        needs_a_mask = variant.attention_type == "prefix" or has_bias or variant.documents
        return device == "cuda" and not needs_a_mask
    plain = variant.attention_type == "causal" and not (has_bias or variant.window)
    if back_end in PAGED:
        # They keep requests apart by themselves, but do not say where each ends, and read no `document_ids`.
        return plain and not variant.documents and variant.positions != "rope_dynamic"
    return plain and not variant.documents


def extra(variant):
    return ("documents",) if variant.documents else ()


def test_the_known_back_ends_are_those():
    assert set(KINDS) == {*KNOWN, *ENGINES}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("back_end", [*KNOWN, *PAGED, *UNKNOWN])
def test_every_entry_of_the_table(back_end, device):
    for variant, direction in itertools.product(VARIANTS, DIRECTIONS):
        allowed = can_serve(variant, back_end, device, direction)
        config = variant.config()
        reason = refusal(config, back_end, device, direction, extra(variant))
        assert (reason is None) == allowed, (variant, direction, reason)
        if allowed:
            check(config, back_end, device, direction, extra(variant))
            continue
        with pytest.raises(ValueError, match="attn_implementation") as caught:
            check(config, back_end, device, direction, extra(variant))
        message = str(caught.value)
        assert repr(back_end) in message and reason in message and device in message and direction in message
        assert "'sdpa'" in message or "CUDA" in message, "no way out is named"


@pytest.mark.parametrize("back_end", [*KNOWN, *PAGED, *UNKNOWN])
def test_a_back_end_is_refused_everywhere_only_where_no_device_serves_it(back_end):
    for variant in VARIANTS:
        places = itertools.product(DEVICES, DIRECTIONS)
        hopeless = not any(can_serve(variant, back_end, device, way) for device, way in places)
        assert (refusal(variant.config(), back_end, extra_features=extra(variant)) is not None) == hopeless, variant


@pytest.mark.parametrize("back_end", [*KNOWN, *PAGED, *UNKNOWN])
def test_minillm_info_says_the_same(back_end):
    for variant in VARIANTS:
        if variant.documents:
            continue
        config = variant.config()
        reasons = []
        for device in DEVICES:
            able = [way for way in DIRECTIONS if can_serve(variant, back_end, device, way)]
            expected = {0: "refused", len(DIRECTIONS): "yes"}.get(len(able), f"{', '.join(able)} only")
            assert served(config, back_end, device) == expected, (variant, device)
            refused = [way for way in DIRECTIONS if way not in able]
            reasons += [refusal(config, back_end, device, way) for way in refused]
        assert refusal_reasons(config, back_end) == list(dict.fromkeys(reasons))


def test_sdpa_is_chosen_where_none_is_named():
    for variant in VARIANTS:
        assert can_serve(variant, "sdpa", "cpu", "generate") and refusal(variant.config(), None, "cpu") is None
    for attention_type, positions in itertools.product(("causal", "prefix", "bidirectional"), POSITION_KINDS):
        config = Variant(attention_type, positions, None, 0.0, False).config()
        assert MiniLLMForCausalLM(config).config._attn_implementation == "sdpa"
        assert AutoModel.from_config(tiny_config()).config._attn_implementation == "sdpa"


# Every row of refusals that holds wherever the model may run.
HOPELESS = [
    (variant, back_end)
    for variant in (
        Variant("prefix", "rope", None, 0.0, False),
        Variant("prefix", "glm_2d", None, 0.0, False),
        Variant("causal", "alibi", None, 0.0, False),
        Variant("causal", "sandwich", None, 0.0, False),
        Variant("bidirectional", "none", None, 0.0, False),
        Variant("causal", "rope", 3, 0.0, False),
    )
    for back_end in [*KNOWN, *PAGED, *UNKNOWN]
    if refusal(variant.config(), back_end) is not None
]


def test_every_kind_of_refusal_is_attempted():
    assert {back_end for _, back_end in HOPELESS} == {*KNOWN[4:], *PAGED, *UNKNOWN}


def saved(config, folder, **keys):
    """A folder with a tiny model, and these keys written into its config.json."""
    MiniLLMForCausalLM(config).save_pretrained(folder)
    written = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(written | keys))
    return folder


def assigned(config, back_end):
    config._attn_implementation = back_end
    return config


WAYS = {
    "from_pretrained": lambda make, folder, name: MiniLLMForCausalLM.from_pretrained(
        saved(make(), folder), attn_implementation=name
    ),
    "auto_from_pretrained": lambda make, folder, name: AutoModelForCausalLM.from_pretrained(
        saved(make(), folder), attn_implementation=name
    ),
    "another_head": lambda make, folder, name: AutoModelForSequenceClassification.from_pretrained(
        saved(make(), folder), attn_implementation=name
    ),
    "set_attn_implementation": lambda make, folder, name: MiniLLMForCausalLM(make()).set_attn_implementation(name),
    "set_by_dictionary": lambda make, folder, name: MiniLLMModel(make()).set_attn_implementation({"": name}),
    "_from_config": lambda make, folder, name: MiniLLMForCausalLM._from_config(make(), attn_implementation=name),
    "auto_from_config": lambda make, folder, name: AutoModelForCausalLM.from_config(make(), attn_implementation=name),
    "keyword_of_the_config": lambda make, folder, name: MiniLLMForCausalLM(make(attn_implementation=name)),
    "private_keyword_of_the_config": lambda make, folder, name: MiniLLMModel(make(_attn_implementation=name)),
    "assigned_to_the_config": lambda make, folder, name: MiniLLMForSequenceClassification(assigned(make(), name)),
    "key_in_the_file": lambda make, folder, name: AutoModelForCausalLM.from_pretrained(
        saved(make(), folder, attn_implementation=name)
    ),
    "private_key_in_the_file": lambda make, folder, name: AutoModelForCausalLM.from_pretrained(
        saved(make(), folder, _attn_implementation=name)
    ),
    "auto_config": lambda make, folder, name: AutoModelForCausalLM.from_config(
        AutoConfig.from_pretrained(saved(make(), folder), attn_implementation=name)
    ),
}


@pytest.mark.parametrize("way", WAYS)
def test_every_way_of_choosing_passes_the_gate(way, my_kernel, tmp_path):
    for index, (variant, back_end) in enumerate(HOPELESS):
        with pytest.raises(ValueError, match="cannot serve this model") as caught:
            WAYS[way](variant.config, tmp_path / str(index), back_end)
        assert repr(back_end) in str(caught.value), f"{variant} {back_end}"


@pytest.mark.parametrize("way", WAYS)
def test_every_way_of_choosing_lets_pass_what_is_served(way, tmp_path):
    for back_end in ("eager", "sdpa", "flex_attention"):
        model = WAYS[way](tiny_config, tmp_path / back_end, back_end)
        # Setters return nothing, and are seen below.
        assert model is None or model.config._attn_implementation == back_end


def test_a_refused_setting_leaves_the_model_as_it_was():
    model = loud_model(tiny_config(attention_type="prefix"))
    inputs = batch(model.config, "plain")
    with torch.no_grad():
        before = model(**inputs).logits
        for back_end in (*KNOWN[4:], *UNKNOWN):
            with pytest.raises(ValueError):
                model.set_attn_implementation(back_end)
        assert model.config._attn_implementation == "sdpa"
        assert torch.equal(model(**inputs).logits, before)
    model.set_attn_implementation("eager")
    assert model.config._attn_implementation == "eager"


@pytest.mark.parametrize("back_end", KNOWN[4:])
@pytest.mark.parametrize("attention_type", ["causal", "bidirectional"])
def test_flash_attention_is_refused_on_cpu(attention_type, back_end):
    """The package may be there, and the model too, before the device is known."""
    model = loud_model(tiny_config(attention_type=attention_type))
    model.config._attn_implementation_internal = back_end
    for mode in (torch.no_grad, torch.enable_grad):
        with mode(), pytest.raises(ValueError, match="need a CUDA device"):
            model(**batch(model.config, "plain"))
    if attention_type == "causal":
        with pytest.raises(ValueError, match="need a CUDA device"):
            model.generate(torch.tensor([[3, 4]]), max_new_tokens=1)


@pytest.mark.parametrize("frozen", [False, True], ids=["whole", "frozen_embedding"])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_flex_attention_on_cpu_takes_no_gradient(training, frozen):
    """Where the embedding is frozen, as under LoRA, it is torch that refuses."""
    model = loud_model(tiny_config(attn_implementation="flex_attention")).train(training)
    model.model.embed_tokens.requires_grad_(not frozen)
    with pytest.raises((ValueError, NotImplementedError), match=r"on CPU|on cpu"):
        model(**batch(model.config, "plain"))


def test_flex_attention_on_cpu_does_not_generate():
    model = loud_model(tiny_config(attn_implementation="flex_attention"))
    with pytest.raises(ValueError, match=r"flex.*on cpu, generate.*'sdpa' or 'eager'"):
        model.generate(torch.tensor([[3, 4]]), max_new_tokens=1)


def test_flex_attention_takes_no_dropout():
    model = loud_model(tiny_config(attn_implementation="flex_attention", attention_dropout=0.1)).train()
    inputs = batch(model.config, "plain")
    with pytest.raises(ValueError, match="flex"):
        model(**inputs)
    with torch.no_grad(), pytest.raises(ValueError, match="dropout"):
        model(**inputs)


@pytest.mark.parametrize("positions", ["rope", "rope_2d", "learned", "sinusoidal", "glm_2d", "none"])
@pytest.mark.parametrize("layout", ["plain", "left_padding", "right_padding", "hole"])
def test_an_unknown_back_end_serves_plain_causal_attention(my_kernel, positions, layout):
    model = loud_model(tiny_config(**POSITION_KINDS[positions]))
    inputs = batch(model.config, layout)
    real = real_tokens(inputs)
    found = []
    for back_end in ("eager", my_kernel):
        model.set_attn_implementation(back_end)
        model.zero_grad()
        logits = model(**inputs).logits[real]
        logits.square().sum().backward()
        found.append((logits, [parameter.grad.clone() for parameter in model.parameters()]))
    torch.testing.assert_close(found[1][0], found[0][0], atol=2e-5, rtol=1e-5)
    for gradient, expected in zip(found[1][1], found[0][1], strict=True):
        torch.testing.assert_close(gradient, expected, atol=2e-5 * expected.abs().max().item() + 1e-4, rtol=1e-4)


@pytest.mark.parametrize("fields", [{}, {"attention_type": "prefix"}, {"position_embedding_type": "alibi"}])
def test_a_name_that_nobody_knows_is_refused_by_transformers(fields, my_kernel):
    model = loud_model(tiny_config(**fields))
    with pytest.raises(ValueError, match='Specified `attn_implementation="foo"` is not supported'):
        model.set_attn_implementation("foo")
    if fields:
        for known in (my_kernel, "kernels-community/x"):
            with pytest.raises(ValueError, match="computes plain causal attention only"):
                model.set_attn_implementation(known)


@pytest.mark.parametrize("layout", ["packing", "packing_by_positions"])
def test_an_unknown_back_end_refuses_packed_documents(my_kernel, layout):
    model = loud_model(tiny_config())
    model.set_attn_implementation(my_kernel)
    for direction, mode in (("forward", torch.no_grad), ("backward", torch.enable_grad)):
        with mode(), pytest.raises(ValueError, match=rf"documents, on cpu, {direction}"):
            model(**batch(model.config, layout))


def test_a_bias_or_window_assigned_later_is_refused_when_used(my_kernel):
    model = loud_model(tiny_config())
    model.set_attn_implementation(my_kernel)
    model.config.sliding_window = 3
    with pytest.raises(ValueError, match="window"):
        model(**batch(model.config, "plain"))


@pytest.mark.parametrize("back_end", ["eager", "sdpa"])
@pytest.mark.parametrize("key", ["read_index", "write_index"])
@pytest.mark.parametrize(
    "variant",
    [
        Variant("prefix", "rope", None, 0.0, False),
        Variant("bidirectional", "rope", None, 0.0, False),
        Variant("causal", "alibi", None, 0.0, False),
        Variant("causal", "sandwich", None, 0.0, False),
        Variant("causal", "rope", 3, 0.0, False),
        Variant("prefix", "alibi", 3, 0.0, False),
    ],
    ids=lambda variant: f"{variant.attention_type}-{variant.positions}-{variant.window}",
)
def test_a_paged_call_is_refused_for_all_but_plain_causal(variant, key, back_end):
    model = loud_model(variant.config())
    model.set_attn_implementation(back_end)
    with torch.no_grad(), pytest.raises(ValueError, match="paged cache"):
        model(torch.tensor([[3, 4, 5]]), **{key: [torch.arange(3)]})


def test_a_config_of_another_back_end_is_saved_without_it(tmp_path):
    """The choice is the machine's, not the model's: a folder carries none."""
    config = MiniLLMConfig(**tiny_config().to_dict() | {"attn_implementation": "eager"})
    MiniLLMForCausalLM(config).save_pretrained(tmp_path)
    assert "attn_implementation" not in (tmp_path / "config.json").read_text()
    assert MiniLLMForCausalLM.from_pretrained(tmp_path).config._attn_implementation == "sdpa"
