"""Presets: valid, buildable, and what the released configs, transformers' classes and published totals say."""

import copy
import functools
import json

import pytest
import torch
from published_configs import OTHERS, SHIPPED
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedTokenizerFast

from minillm import MiniLLMConfig, MiniLLMForCausalLM, MiniLLMTokenizer
from minillm.configuration import PRESETS
from minillm.conversion import detect
from minillm.conversion.family import NOT_COMPARED
from minillm.publishing.description import describe

FAMILIES = (
    "minillm gpt2 bloom falcon mpt llama baichuan baichuan2 mixtral glm-infilling glm-130b chatglm chatglm2 glm"
).split()
FIELDS = sorted(set(MiniLLMConfig.__annotations__) - NOT_COMPARED)

TOTALS = {
    # Model cards of GPT-2's and BLOOM's repositories, and their safetensors files.
    "gpt2": 124_439_808,
    "gpt2-xl": 1_557_611_200,
    "bloom-560m": 559_214_592,
    "bloom-1b1": 1_065_314_304,
    "bloom-1b7": 1_722_408_960,
    "bloom-3b": 3_002_557_440,
    "bloom-7b1": 7_069_016_064,
    "bloom-176b": 176_247_271_424,
    # 13,843,441,408 and 141,107,412,992 bytes in 16 bits, by the indices of their safetensors files.
    "falcon-7b": 6_921_720_704,
    "llama-3-70b": 70_553_706_496,
    "llama-7b": 6_738_415_616,
    "llama-3-8b": 8_030_261_248,
    # The table in Baichuan-13B's README.
    "baichuan-7b": 7_000_559_616,
    "baichuan-13b": 13_264_901_120,
    # The loaded model's count, in logs of its fine-tuning.
    "chatglm2-6b": 6_243_584_000,
}
ROUNDED = {
    # arXiv 2005.14165, table 2.1.
    "gpt-3-125m": 125e6,
    "gpt-3-350m": 350e6,
    "gpt-3-760m": 760e6,
    "gpt-3-1.3b": 1.3e9,
    "gpt-3-2.7b": 2.7e9,
    "gpt-3-6.7b": 6.7e9,
    "gpt-3-13b": 13.0e9,
    "gpt-3-175b": 175e9,
    # The tables in the READMEs of GLM and GLM-130B.
    "glm-base": 110e6,
    "glm-large": 335e6,
    "glm-410m": 410e6,
    "glm-515m": 515e6,
    "glm-2b": 2e9,
    "glm-10b": 10e9,
    "glm-10b-chinese": 10e9,
    "glm-130b": 130e9,
    # Model cards.
    "mpt-30b": 29.95e9,
    "glm-4-9b": 9.4e9,
    "llama-2-70b": 69e9,
    "llama-3.1-405b": 405e9,
    "mixtral-8x7b": 46.7e9,
    "mixtral-8x22b": 141e9,
}


def preset(name, **overrides):
    return MiniLLMConfig.from_preset(name, **overrides)


@functools.cache
def count(name):
    with torch.device("meta"):
        return MiniLLMForCausalLM(preset(name)).num_parameters()


def test_every_family_has_presets():
    assert list(dict.fromkeys(preset.family for preset in PRESETS.values())) == FAMILIES


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_means_what_it_says_and_computes(name):
    description, source, fields, _ = PRESETS[name]
    assert description and source
    before = copy.deepcopy(fields)
    config = preset(name)
    assert {field: getattr(config, field) for field in fields} == fields == before
    words = describe(config)["size"]
    assert str(config.num_hidden_layers) in words and str(config.vocab_size) in words
    again = MiniLLMConfig.from_dict(json.loads(config.to_json_string(use_diff=False)))
    assert again.to_dict() == MiniLLMConfig.from_dict(config.to_diff_dict()).to_dict() == config.to_dict()
    with torch.device("meta"):
        # In bfloat16, the only type that the kernel of mixtures of experts takes on the meta device.
        model = MiniLLMForCausalLM(preset(name, num_hidden_layers=1)).bfloat16()
        logits = model(torch.zeros(1, 4, dtype=torch.long)).logits
    assert logits.shape == (1, 4, config.vocab_size)


def test_a_config_takes_nothing_from_its_preset():
    before = copy.deepcopy(PRESETS["llama-3.1-8b"].fields)
    config = preset("llama-3.1-8b")
    config.rope_parameters["rope_theta"] = 1.0
    assert PRESETS["llama-3.1-8b"].fields == before


@pytest.mark.parametrize("name", [*SHIPPED, *OTHERS])
def test_a_preset_is_the_released_config(name):
    raw = (SHIPPED | OTHERS)[name]
    read, ours = detect(raw).read_config(raw), preset(name)
    assert {field: getattr(read, field) for field in FIELDS} == {field: getattr(ours, field) for field in FIELDS}


@pytest.mark.parametrize("name", SHIPPED)
def test_a_preset_has_as_many_parameters_as_the_native_class(name):
    native = CONFIG_MAPPING[SHIPPED[name]["model_type"]].from_dict(SHIPPED[name])
    with torch.device("meta"):
        expected = AutoModelForCausalLM.from_config(native).num_parameters()
    assert count(name) == expected


def test_glm_4_has_as_many_parameters_as_the_native_class():
    """Native `glm` has the same weights as the released ones; only the names in its config differ."""
    with torch.device("meta"):
        native = AutoModelForCausalLM.from_config(CONFIG_MAPPING["glm"](num_key_value_heads=2, attention_bias=True))
    assert count("glm-4-9b") == count("glm-4-9b-chat") == native.num_parameters()


@pytest.mark.parametrize("name", TOTALS)
def test_a_preset_has_the_published_number_of_parameters(name):
    assert count(name) == TOTALS[name]


@pytest.mark.parametrize("name", ROUNDED)
def test_a_preset_has_about_the_published_number_of_parameters(name):
    # Some sizes are named by one digit: GLM 2B has 1.92B.
    assert count(name) == pytest.approx(ROUNDED[name], rel=0.045)


def test_chatglm_has_the_published_number_of_parameters():
    """The total of the loaded model, in logs of its fine-tuning, has the embedding and the head, its copy, once."""
    config = preset("chatglm-6b")
    assert count("chatglm-6b") - config.vocab_size * config.hidden_size == 6_173_286_400


def test_presets_that_train_on_a_laptop():
    minis = [name for name, preset in PRESETS.items() if preset.family == "minillm"]
    assert minis == ["minillm-causal-10m", "minillm-prefix-10m", "minillm-alibi-10m"]
    assert all(5e6 < count(name) < 15e6 for name in minis)


def test_a_config_for_a_tokenizer_has_its_vocabulary_and_ids():
    tokenizer = MiniLLMTokenizer.train_from_iterator(["one two"], vocab_size=300, show_progress=False)
    ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    assert None not in ids.values() and len(set(ids.values())) == 3
    config = MiniLLMConfig.for_tokenizer(tokenizer, hidden_size=64, num_attention_heads=4)
    assert config == MiniLLMConfig(vocab_size=len(tokenizer), hidden_size=64, num_attention_heads=4, **ids)
    preset = MiniLLMConfig.for_tokenizer(tokenizer, preset="llama-2-7b", num_hidden_layers=3)
    assert preset == MiniLLMConfig.from_preset("llama-2-7b", vocab_size=len(tokenizer), num_hidden_layers=3, **ids)
    wider = MiniLLMConfig.for_tokenizer(tokenizer, vocab_size=320, pad_token_id=None)
    assert (wider.vocab_size, wider.pad_token_id, wider.eos_token_id) == (320, None, tokenizer.eos_token_id)
    few = len(tokenizer) - 1
    with pytest.raises(ValueError, match=rf"`vocab_size={few}` has no room for the {len(tokenizer)} ids"):
        MiniLLMConfig.for_tokenizer(tokenizer, vocab_size=few)
    with pytest.raises(ValueError, match="unknown preset 'lama'"):
        MiniLLMConfig.for_tokenizer(tokenizer, preset="lama")


def test_a_config_for_a_tokenizer_with_unused_ids_has_room_for_all():
    """Ids with a gap between them, and without special tokens: a word model by hand."""
    words = Tokenizer(WordLevel({"one": 0, "two": 9}, unk_token="one"))
    config = MiniLLMConfig.for_tokenizer(PreTrainedTokenizerFast(tokenizer_object=words), hidden_size=64)
    assert (config.vocab_size, config.bos_token_id, config.eos_token_id) == (10, None, None)


@pytest.mark.parametrize(
    "wrong", ["gpt2", None, Tokenizer(WordLevel({"one": 0})), MiniLLMConfig()], ids=lambda wrong: type(wrong).__name__
)
def test_a_config_is_made_for_a_tokenizer_of_transformers_only(wrong):
    with pytest.raises(TypeError, match=r"must be a tokenizer of transformers, not .*AutoTokenizer.from_pretrained"):
        MiniLLMConfig.for_tokenizer(wrong)


def test_a_config_for_a_tokenizer_has_no_ids_of_another_one(caplog):
    words = WordLevel({f"word{n}": n for n in range(12)}, unk_token="word0")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(words))
    small = {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    config = MiniLLMConfig.for_tokenizer(tokenizer, preset="chatglm-6b", **small)
    blanks = ("mask_token_id", "gmask_token_id", "smask_token_id", "sop_token_id")
    assert [getattr(config, name) for name in blanks] == [None] * 4 and "lies outside" not in caplog.text
    wide = MiniLLMConfig.for_tokenizer(tokenizer, preset="chatglm-6b", vocab_size=130528, **small)
    assert [getattr(wide, name) for name in blanks] == [130000, 130001, None, 130004]
    given = MiniLLMConfig.for_tokenizer(tokenizer, preset="chatglm-6b", mask_token_id=3, sop_token_id=4, **small)
    assert [getattr(given, name) for name in blanks] == [3, None, None, 4]
    for field, value in {"eos_token_id": 300, "mask_token_id": 12, "turn_token_ids": [1, 12]}.items():
        with pytest.raises(ValueError, match=rf"`{field}=(300|12)` lies outside the vocabulary of `vocab_size=12`"):
            MiniLLMConfig.for_tokenizer(tokenizer, **{field: value})
