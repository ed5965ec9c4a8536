"""GGUF files: a tiny LLaMA becomes a MiniLLM with equal logits; what transformers' reader passes over is refused."""

import sys

import gguf
import pytest
import torch
from cli_cases import invoke
from gguf_cases import TEXT, byte_level_tokenizer, write_gguf
from native_families import LLAMA, native_model
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from minillm.conversion import ConversionError, convert, load


def logits_of(model):
    ids = torch.tensor([[3, 9, 4, 33, 21, 7]])
    with torch.no_grad():
        return model.eval()(ids).logits


@pytest.fixture
def llama(tmp_path):
    """A native LLaMA and the name of a file to write."""
    return native_model("llama_gqa_tied"), tmp_path / "tiny.gguf"


def test_a_title_is_passed_over(llama):
    native, file = llama
    model = load(write_gguf(file, native, **{"general.name": "A title"}))
    torch.testing.assert_close(logits_of(model), logits_of(native), atol=1e-5, rtol=0)


@pytest.mark.mostly_thorough("llama_gqa_tied")
@pytest.mark.parametrize("name", ["llama", "llama_gqa_tied", "llama_mqa"])
def test_logits_tokenizer_and_generation_config(name, tmp_path):
    native = native_model(name.replace("mqa", "gqa_tied"))
    if name == "llama_mqa":
        fields = {"num_key_value_heads": 1, "head_dim": 16, "rms_norm_eps": 1e-5, "tie_word_embeddings": False}
        native = LlamaForCausalLM(LlamaConfig(**LLAMA, **fields, rope_parameters={"rope_theta": 500.0}))
    file = write_gguf(tmp_path / "tiny.gguf", native)
    result = invoke("convert", "--from", file, "--to", tmp_path / "ours")
    assert result.exit_code == 0, (result.output, result.exception)
    assert "agree with the source's" in result.output
    result = invoke("convert", "--from", file, "--to", tmp_path / "low", "--dtype", "bfloat16")
    assert "agree with the source's" in result.output
    model, loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "ours"), load(file)
    assert type(model).__name__ == "MiniLLMForCausalLM" and model.dtype == torch.float32
    for each in (model, loaded):
        torch.testing.assert_close(logits_of(each), logits_of(native), atol=1e-5, rtol=0)
        assert each.generation_config.eos_token_id == 2 and each.generation_config.pad_token_id == 0
    tokenizer, original = AutoTokenizer.from_pretrained(tmp_path / "ours"), byte_level_tokenizer(64)
    ids = original(TEXT)["input_ids"]
    assert len(ids) < len(TEXT) / 2
    assert tokenizer(TEXT)["input_ids"] == ids and tokenizer.decode(ids) == TEXT
    assert len(tokenizer) == 64
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 0)
    assert tokenizer.apply_chat_template([{"role": "user", "content": "line"}], tokenize=False) == "<s>line</s>"


def test_the_begin_token_is_added_where_the_file_says_so(llama, tmp_path):
    native, file = llama
    convert(write_gguf(file, native, add_bos=True), tmp_path / "ours")
    ids = byte_level_tokenizer(64)(TEXT)["input_ids"]
    assert AutoTokenizer.from_pretrained(tmp_path / "ours")(TEXT)["input_ids"] == [1, *ids]


def test_quantized_weights_are_what_transformers_makes_of_them(tmp_path):
    file = tmp_path / "tiny.gguf"
    torch.manual_seed(0)
    fields = {"hidden_size": 64, "num_attention_heads": 4, "intermediate_size": 96, "initializer_range": 0.15}
    native = LlamaForCausalLM(LlamaConfig(**LLAMA | fields))
    write_gguf(file, native, gguf.GGMLQuantizationType.Q8_0)
    expected = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=file.name, dtype=torch.float32)
    assert (logits_of(expected) - logits_of(native)).abs().max() > 1e-3
    torch.testing.assert_close(logits_of(load(file)), logits_of(expected), atol=1e-5, rtol=0)
    assert load(file, dtype=torch.bfloat16).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"llama.rope.scaling.type": "linear"}, r"llama\.rope\.scaling\.type='linear'"),
        ({"llama.rope.scaling.factor": 4.0}, r"llama\.rope\.scaling\.factor=4\.0"),
        ({"llama.expert_count": 8}, r"llama\.expert_count=8"),
        ({"llama.attention.key_length": 16}, r"llama\.attention\.key_length=16"),
        ({"llama.attention.head_count_kv": None}, r"lacks `llama\.attention\.head_count_kv`"),
        ({"split.count": 2}, r"split\.count=2"),
    ],
    ids=str,
)
def test_settings_that_transformers_passes_over_are_named(changes, message, llama, tmp_path):
    native, file = llama
    write_gguf(file, native, **changes)
    with pytest.raises(ConversionError, match=message):
        load(file)
    result = invoke("convert", "--from", file, "--to", tmp_path / "ours")
    assert result.exit_code == 1 and next(iter(changes)) in result.stderr.splitlines()[-1]
    assert [path.name for path in tmp_path.iterdir()] == [file.name]


def test_a_setting_is_vouched_for_and_said_in_the_fields_of_the_config(llama, tmp_path):
    """As for a Llama 3.1, whose file holds the factors of its frequencies as a tensor."""
    native, file = llama
    fields = {"rope_type": "llama3", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 16}
    stretched = fields | {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
    write_gguf(file, native, tensors={"rope_freqs.weight": torch.ones(4)})
    with pytest.raises(ConversionError, match=r"rope_freqs\.weight"):
        load(file)
    expected = type(native)(type(native.config)(**native.config.to_dict() | {"rope_parameters": stretched}))
    expected.load_state_dict(native.state_dict())
    found = load(file, ignore_keys=["rope_freqs.weight"], rope_parameters=stretched)
    torch.testing.assert_close(logits_of(found), logits_of(expected), atol=1e-5, rtol=0)
    assert not torch.allclose(logits_of(native), logits_of(expected), atol=1e-2)
    # transformers reads the file without them: no difference to be refused.
    convert(file, tmp_path / "ours", ignore_keys=["rope_freqs.weight"], rope_parameters=stretched)
    written = AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    torch.testing.assert_close(logits_of(written), logits_of(expected), atol=1e-5, rtol=0)


def test_tensors_that_are_missing_or_unknown_are_named(llama):
    native, file = llama
    write_gguf(file, native, leave_out={"model.layers.1.mlp.up_proj.weight"})
    with pytest.raises(ConversionError, match=r"lacks `model\.layers\.1\.mlp\.up_proj\.weight`"):
        load(file)
    write_gguf(file, native, tensors={"blk.0.attn_q.bias": torch.ones(48)})
    with pytest.raises(ConversionError, match=r"blk\.0\.attn_q\.bias"):
        load(file)


def test_other_architectures_and_broken_files_are_named(llama):
    native, file = llama
    write_gguf(file, native, architecture="qwen2")
    with pytest.raises(ConversionError, match="holds a 'qwen2'"):
        load(file)
    write_gguf(file, native)
    whole = file.read_bytes()
    for part in (whole[:-1000], whole[:3000], b"", b"GGUF", b"x" * 3000):
        file.write_bytes(part)
        with pytest.raises(ConversionError, match=r"tiny\.gguf is (damaged or cut off|empty|no GGUF file)"):
            load(file)
    with pytest.raises(ConversionError, match=r"none\.gguf does not exist"):
        load(file.with_name("none.gguf"))


def test_without_the_package_the_line_that_installs_it_is_said(llama, monkeypatch):
    native, file = llama
    write_gguf(file, native)
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ConversionError, match="pip install gguf"):
        load(file)
