"""What a conversion does not honour is refused by name: keys of other families, tensors that are no weights."""

import contextlib
import copy
import json
import re
from pathlib import Path

import pytest
import torch
from conversion_cases import edit_json, logits_of, save_native
from native_families import CASES, LLAMA, fill_loudly, native_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from minillm import MiniLLMConfig, MiniLLMForCausalLM
from minillm.conversion import FAMILIES, ConversionError, convert, export, load
from minillm.conversion.family import Family

FIXTURES = Path(__file__).parents[1] / "families"
FAMILY_OF = {
    "chatglm-6b": "chatglm",
    "chatglm2-6b": "chatglm2",
    "glm-10b": "glm-infilling",
    "baichuan-7b": "baichuan",
}


def edit_tensor(folder, name, change):
    """Changes one tensor of a folder's file."""
    file = folder / "model.safetensors"
    tensors = load_file(file)
    tensors[name] = change(tensors[name])
    save_file(tensors, file, {"format": "pt"})


# --- keys ---


def test_bloom_in_slices_is_refused(tmp_path):
    native = save_native(tmp_path / "native", "bloom_odd_heads")
    config = tmp_path / "native" / "config.json"
    for harmless in ({"slow_but_exact": True, "pretraining_tp": 1}, {"slow_but_exact": False, "pretraining_tp": 2}):
        edit_json(config, **harmless)
        torch.testing.assert_close(logits_of(load(tmp_path / "native")), logits_of(native))
    edit_json(config, slow_but_exact=True, pretraining_tp=2)
    sliced = AutoModelForCausalLM.from_pretrained(tmp_path / "native")
    assert (logits_of(sliced) - logits_of(native)).abs().max() > 0.1
    with pytest.raises(ConversionError, match=r"slow_but_exact=True.*pretraining_tp=2.*ignore_keys"):
        load(tmp_path / "native")
    found = load(tmp_path / "native", ignore_keys=["slow_but_exact"])
    torch.testing.assert_close(logits_of(found), logits_of(native))


@pytest.mark.parametrize(
    "key, value",
    [
        ("qk_gn", True),
        ("sliding_window_size", 4),
        ("kv_n_heads", 2),
        ("foo", 1),
        ("attn_type", "multiquery_attention"),
    ],
)
def test_unknown_keys_of_mpts_attention_are_named(key, value, tmp_path):
    native = save_native(tmp_path / "native", "mpt_odd_heads")
    config = tmp_path / "native" / "config.json"
    attention = json.loads(config.read_text("utf-8"))["attn_config"]
    edit_json(config, attn_config={**attention, "attn_impl": "triton", "attn_uses_sequence_id": False})
    torch.testing.assert_close(logits_of(load(tmp_path / "native")), logits_of(native))
    edit_json(config, attn_config={**attention, key: value})
    with pytest.raises(ConversionError, match=re.escape(f"attn_config[{key!r}]={value!r}")):
        load(tmp_path / "native")


@pytest.mark.parametrize("name", ["chatglm-6b", "chatglm2-6b", "glm-10b", "baichuan-7b"])
@pytest.mark.parametrize("key", ["hidden_size", "num_attention_heads", "num_layers"])
def test_sizes_without_a_default_are_asked_for(name, key, tmp_path):
    raw = json.loads((FIXTURES / name / "config.json").read_text("utf-8"))
    key = "num_hidden_layers" if name == "baichuan-7b" and key == "num_layers" else key
    family = FAMILIES[FAMILY_OF[name]]
    family.read_config(raw)
    for lacking in ({other: raw[other] for other in raw if other != key}, {**raw, key: None}):
        with pytest.raises(ConversionError, match=rf"lacks `{key}`, which has no default"):
            family.read_config(lacking)


@pytest.mark.parametrize("name", ["llama", "falcon_7b", "falcon_40b", "mixtral"])
@pytest.mark.parametrize("inside", [True, False], ids=["in_rope_parameters", "beside"])
def test_rope_on_a_part_of_the_head_is_refused_where_the_family_does_not_read_it(name, inside, tmp_path):
    native = save_native(tmp_path / "native", name)
    config = tmp_path / "native" / "config.json"
    rope = native.config.rope_parameters
    for factor in (1.0, 0.5):
        if inside:
            edit_json(config, rope_parameters={**rope, "partial_rotary_factor": factor})
        else:
            edit_json(config, rope_parameters=rope, partial_rotary_factor=factor)
        # transformers does not read it: that is what makes it wrong to do so here.
        stock = logits_of(AutoModelForCausalLM.from_pretrained(tmp_path / "native"))
        torch.testing.assert_close(stock, logits_of(native))
        if factor == 1.0:
            torch.testing.assert_close(logits_of(load(tmp_path / "native")), stock)
    with pytest.raises(ConversionError, match=r"rope_parameters\['partial_rotary_factor'\]=0\.5"):
        load(tmp_path / "native")
    torch.testing.assert_close(logits_of(load(tmp_path / "native", rope_parameters=rope)), stock)


def test_rope_on_a_part_of_the_head_is_no_llama(tmp_path):
    rope = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}
    MiniLLMForCausalLM(MiniLLMConfig(**LLAMA, rope_parameters=rope)).save_pretrained(tmp_path / "ours")
    with pytest.raises(ConversionError, match=r"no llama.*partial_rotary_factor'\]=0\.5"):
        export(tmp_path / "ours", tmp_path / "out", "llama")
    assert not (tmp_path / "out").exists()


def whole_heads_of_glm():
    rope = {"rope_type": "default", "rope_theta": 10000.0}
    return MiniLLMConfig(
        **LLAMA, num_key_value_heads=2, attention_qkv_bias=True, rope_interleaved=True, rope_parameters=rope
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_writing_a_config_leaves_its_source_as_it_is(family):
    config = whole_heads_of_glm()
    before = copy.deepcopy(config.to_dict())
    with contextlib.suppress(ConversionError):
        FAMILIES[family].write_config(config)
    assert config.to_dict() == before
    native = {"model_type": FAMILIES[family].model_type, "rope_parameters": {"rope_theta": 500.0}}
    with contextlib.suppress(ConversionError):
        FAMILIES[family].read_config(native)
    assert native["rope_parameters"] == {"rope_theta": 500.0}


def test_whole_heads_are_no_glm_unless_they_say_so(tmp_path):
    """transformers' GLM turns half of each head where nothing is said."""
    ours = fill_loudly(MiniLLMForCausalLM(whole_heads_of_glm()))
    ours.save_pretrained(tmp_path / "ours")
    with pytest.raises(ConversionError, match=r"no glm; in the way: `rope_parameters=.*'partial_rotary_factor': 0\.5"):
        export(tmp_path / "ours", tmp_path / "out", "glm")
    assert not (tmp_path / "out").exists()
    said = {**ours.config.rope_parameters, "partial_rotary_factor": 1.0}
    export(tmp_path / "ours", tmp_path / "out", "glm", rope_parameters=said)
    torch.testing.assert_close(logits_of(AutoModelForCausalLM.from_pretrained(tmp_path / "out")), logits_of(ours))
    assert set(said) == {"rope_type", "rope_theta", "partial_rotary_factor"}


NTK = {"rope_type": "ntk", "rope_theta": 10000.0, "factor": 2.0}
OF_OUR_OWN = {
    "gtu": ({"hidden_act": "gtu"}, "`hidden_act='gtu'`"),
    "bilinear": ({"hidden_act": "bilinear"}, "`hidden_act='bilinear'`"),
    "ntk": ({"rope_parameters": NTK}, "`rope_parameters['rope_type']='ntk'`"),
}


@pytest.mark.parametrize("case", OF_OUR_OWN)
@pytest.mark.parametrize("name", ["llama", "mixtral", "glm", "falcon_7b"])
def test_what_only_minillm_has_is_no_other_family(name, case, tmp_path):
    changes, words = OF_OUR_OWN[case]
    family = CASES[name][0]
    save_native(tmp_path / "native", name)
    if family != "falcon" or case == "ntk":
        fields = load(tmp_path / "native").config.to_dict() | {"derived_fields": None} | changes
        config = MiniLLMConfig.from_dict(fields)
        with pytest.raises(ConversionError, match=rf"no {family}; in the way: {re.escape(words)} \(only MiniLLM"):
            FAMILIES[family].write_config(config)
    native = {"activation" if family == "falcon" and key == "hidden_act" else key: changes[key] for key in changes}
    edit_json(tmp_path / "native" / "config.json", **native)
    with pytest.raises(ConversionError, match=rf"{re.escape(words)} in a {family} config"):
        load(tmp_path / "native")


def test_an_export_is_compared_with_the_config_of_its_source(tmp_path, monkeypatch):
    write = Family.write_config

    def changed(self, config):
        config.rope_parameters["rope_theta"] = 5.0
        return write(self, config)

    fill_loudly(MiniLLMForCausalLM(MiniLLMConfig(**LLAMA))).save_pretrained(tmp_path / "ours")
    monkeypatch.setattr(Family, "write_config", changed)
    with pytest.raises(ConversionError, match="differs from its source"):
        export(tmp_path / "ours", tmp_path / "out", "llama")


@pytest.mark.parametrize("name", ["pad_token_id", "bos_token_id", "eos_token_id"])
def test_ids_below_zero_stand_for_no_token(name, llama, tmp_path):
    native, folder = llama
    edit_json(folder / "config.json", **{name: -1})
    # As old checkpoints have it: transformers no longer writes such a file.
    edit_json(folder / "generation_config.json", **{"pad_token_id": 0, name: -1})
    torch.testing.assert_close(logits_of(AutoModelForCausalLM.from_pretrained(folder)), logits_of(native))
    convert(folder, tmp_path / "ours")
    loaded = [load(folder), AutoModelForCausalLM.from_pretrained(tmp_path / "ours")]
    for model in loaded:
        torch.testing.assert_close(logits_of(model), logits_of(native))
        assert getattr(model.config, name) is None
        assert getattr(model.generation_config, name) is None


def test_a_list_of_ends_keeps_the_real_ones(llama):
    edit_json(llama[1] / "config.json", eos_token_id=[2, -1, 7], pad_token_id=-1)
    assert load(llama[1]).config.eos_token_id == [2, 7]


# --- tensors ---

NAME = "model.layers.1.mlp.up_proj.weight"
CHANGES = {
    "int8": lambda tensor: (tensor * 100).to(torch.int8),
    "uint8": lambda tensor: tensor.abs().to(torch.uint8),
    "bool": lambda tensor: tensor > 0,
    "int64": lambda tensor: tensor.long(),
    "complex64": lambda tensor: tensor.to(torch.complex64),
    "float8_e4m3fn": lambda tensor: tensor.to(torch.float8_e4m3fn),
    "float8_e5m2": lambda tensor: tensor.to(torch.float8_e5m2),
    "nan": lambda tensor: tensor.index_fill(0, torch.tensor([3]), float("nan")),
    "inf": lambda tensor: tensor.index_fill(1, torch.tensor([5]), -float("inf")),
}


@pytest.mark.parametrize("ending", ["safetensors", "bin"])
@pytest.mark.parametrize("change", CHANGES)
def test_tensors_that_are_no_weights_are_named(change, ending, llama, tmp_path):
    folder = llama[1]
    edit_tensor(folder, NAME, CHANGES[change])
    if ending == "bin":
        torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
        (folder / "model.safetensors").unlink()
    says = "NaN or infinite" if change in ("nan", "inf") else "is stored as"
    for verb in (load, lambda source: convert(source, tmp_path / "ours")):
        with pytest.raises(ConversionError, match=rf"`model\.layers\.1\.mlp\.up_proj\.weight` .*{says}"):
            verb(folder)
    assert [path.name for path in tmp_path.iterdir()] == ["native"]


@pytest.mark.parametrize("change", ["int8", "complex64", "nan"])
def test_export_names_tensors_that_are_no_weights(change, llama, tmp_path):
    convert(llama[1], tmp_path / "ours")
    edit_tensor(tmp_path / "ours", NAME, CHANGES[change])
    with pytest.raises(ConversionError, match=r"`model\.layers\.1\.mlp\.up_proj\.weight`"):
        export(tmp_path / "ours", tmp_path / "back", "llama")
    assert not (tmp_path / "back").exists()


def test_buffers_of_any_dtype_are_passed_over_and_do_not_size_the_shards(tmp_path):
    native = save_native(tmp_path / "native", "gpt2")
    file = tmp_path / "native" / "model.safetensors"
    masks = {f"transformer.h.{i}.attn.bias": torch.ones(1, 1, 8, 8, dtype=torch.bool) for i in range(2)}
    # Sorted first, so that it is the first tensor of the file.
    masks["transformer.a.attn.bias"] = torch.ones(2, dtype=torch.uint8)
    masks["transformer.h.0.attn.masked_bias"] = torch.tensor(float("-inf"))
    save_file(load_file(file) | masks, file, {"format": "pt"})
    torch.testing.assert_close(logits_of(load(tmp_path / "native")), logits_of(native))
    convert(tmp_path / "native", tmp_path / "ours", max_shard_size="60KB")
    sizes = [path.stat().st_size for path in (tmp_path / "ours").glob("*.safetensors")]
    assert len(sizes) > 3 and max(sizes) < 70_000


def test_a_cast_that_makes_a_weight_infinite_is_refused(llama, tmp_path):
    edit_tensor(llama[1], NAME, lambda tensor: tensor.index_fill(0, torch.tensor([3]), 1e6))
    load(llama[1], dtype=torch.bfloat16)
    with pytest.raises(ConversionError, match=r"up_proj\.weight`.*torch\.float16: choose a wider"):
        convert(llama[1], tmp_path / "ours", dtype=torch.float16)
    assert not (tmp_path / "ours").exists()


@pytest.mark.parametrize("dtype", [torch.int8, torch.complex64, torch.float8_e4m3fn, torch.bool], ids=str)
def test_a_dtype_that_is_none_of_weights_is_refused(dtype, llama, tmp_path):
    with pytest.raises(ConversionError, match=f"dtype={dtype}"):
        load(llama[1], dtype=dtype)
    with pytest.raises(ConversionError, match=f"dtype={dtype}"):
        convert(llama[1], tmp_path / "ours", dtype=dtype)
    convert(llama[1], tmp_path / "ours")
    with pytest.raises(ConversionError, match=f"dtype={dtype}"):
        export(tmp_path / "ours", tmp_path / "back", "llama", dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_every_dtype_of_weights_is_kept(dtype, tmp_path):
    native_model("llama", dtype).save_pretrained(tmp_path / "native")
    convert(tmp_path / "native", tmp_path / "ours")
    assert {tensor.dtype for tensor in load_file(tmp_path / "ours" / "model.safetensors").values()} == {dtype}


# --- all keys ---

SWEPT = ["gpt2", "bloom_odd_heads", "llama", "falcon_7b", "falcon_40b", "falcon_rw", "mpt_odd_heads", "glm", "mixtral"]
BESIDE = {
    "is_causal": [False],
    "partial_rotary_factor": [0.5],
    "rope_scaling": [{"rope_type": "linear", "factor": 2.0}],
    "sliding_window": [4],
    "layer_types": [["sliding_attention"] * 2],
    "qk_layernorm": [True],
    "logit_scale": [2.0],
    "attn_logit_softcapping": [1.0],
    "final_logit_softcapping": [1.0],
    "pretraining_tp": [2],
}
# Not of the model: damaged values, and transformers' own requests for other outputs.
NOT_SWEPT = frozenset(
    "dtype torch_dtype transformers_version model_type architectures return_dict output_attentions "
    "output_hidden_states num_attention_heads hidden_size".split()
)


def other_values(value):
    """Values that a key may have instead."""
    if isinstance(value, bool):
        return [not value]
    if isinstance(value, int | float):
        return [value + 1, value + 0.5, 0]
    return ["gelu", "relu"] if isinstance(value, str) else [True, 2] if value is None else []


@pytest.mark.slow
@pytest.mark.parametrize("name", SWEPT)
def test_every_key_is_honoured_or_refused(name, tmp_path):
    """Each key of the family's own config changed by itself: equal logits, or a refusal, or no model of transformers'
    either."""
    native = save_native(tmp_path, name)
    raw = json.loads((tmp_path / "config.json").read_text("utf-8"))
    keys = {key: other_values(value) for key, value in native.config.to_dict().items() if key not in NOT_SWEPT}
    compared, wrong = 0, []
    for key, values in {**keys, **BESIDE}.items():
        for value in values:
            changed = raw | {key: value} | ({"pretraining_tp": 2} if key == "slow_but_exact" else {})
            (tmp_path / "config.json").write_text(json.dumps(changed), "utf-8")
            try:
                found = logits_of(load(tmp_path))
            except ConversionError:
                continue
            try:
                expected = logits_of(AutoModelForCausalLM.from_pretrained(tmp_path))
            except Exception:  # A setting that transformers' class does not work with.
                continue
            compared += 1
            if not torch.allclose(found, expected, atol=1e-4):
                wrong.append(f"{key}={value!r}: off by {(found - expected).abs().max():.1e}")
    assert compared > 10 and not wrong


def test_the_cases_swept_are_all_families_of_transformers():
    assert {CASES[name][0] for name in SWEPT} == {family for family, _ in CASES.values()}
