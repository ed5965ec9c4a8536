"""What is saved can be loaded, or is not saved; a misspelt field is refused where somebody types it, only there."""

import json
import math

import pytest
from matrix_cases import tiny_config
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig

from minillm import MiniLLMConfig, MiniLLMForCausalLM
from minillm.configuration.spellings import FOREIGN_SPELLINGS, KNOWN_EXTRA_KEYS, meant_by

# What transformers' common tests set on any config before they save it.
STOCK = dict.fromkeys(
    "rms_norm_eps layer_norm_eps norm_eps norm_epsilon layer_norm_epsilon batch_norm_eps".split(), 1.0
) | {"is_decoder": True, "gradient_checkpointing": True, "an_unknown_attribute": [1, {"a": None}]}


def plain(config):
    fields = json.loads(json.dumps(config.to_dict()), parse_constant=str)
    return {key: value for key, value in fields.items() if key not in ("auto_map", "_name_or_path")}


def test_what_transformers_sets_is_saved_and_loaded(tmp_path, caplog):
    config = tiny_config()
    for name, value in STOCK.items():
        setattr(config, name, value)
    MiniLLMForCausalLM(config).save_pretrained(tmp_path)
    for read in (
        MiniLLMConfig.from_pretrained(tmp_path),
        AutoConfig.from_pretrained(tmp_path),
        AutoModelForCausalLM.from_pretrained(tmp_path).config,
        MiniLLMConfig.from_json_file(tmp_path / "config.json"),
        MiniLLMConfig.from_dict(config.to_dict()),
        MiniLLMConfig.from_dict(config.to_diff_dict()),
        MiniLLMConfig(**config.to_dict()),
    ):
        assert {**plain(read), "architectures": None, "dtype": None} == {
            **plain(config),
            "architectures": None,
            "dtype": None,
        }
    assert any("`layer_norm_eps=1.0`" in line and "did you mean `norm_eps`" in line for line in caplog.messages)


@pytest.mark.parametrize(("key", "field"), [("hiden_size", "hidden_size"), ("layer_norm_eps", "norm_eps")])
def test_a_misspelt_override_is_refused(key, field, tmp_path):
    config = tiny_config()
    setattr(config, key, 7)
    MiniLLMForCausalLM(config).save_pretrained(tmp_path)
    for type_it in (
        lambda: tiny_config(**{key: 7}),
        lambda: MiniLLMConfig.from_preset("gpt2", **{key: 7}),
        lambda: MiniLLMConfig.from_pretrained(tmp_path, **{key: 7}),
        lambda: AutoConfig.from_pretrained(tmp_path, **{key: 7}),
        lambda: MiniLLMConfig.from_dict(config.to_dict(), **{key: 7}),
        lambda: MiniLLMForCausalLM.from_pretrained(tmp_path, **{key: 7}),
    ):
        with pytest.raises(ValueError, match=f"`{key}=7` is not a field of MiniLLMConfig; did you mean `{field}`"):
            type_it()


def test_arguments_of_loading_are_no_misspelt_fields():
    arguments = (
        "state_dict gguf_file use_safetensors weights_only key_mapping force_download local_files_only token revision "
        "subfolder proxies output_loading_info attn_implementation experts_implementation allow_all_kernels "
        "use_kernels kernel_config quantization_config dtype torch_dtype device_map max_memory offload_folder "
        "offload_buffers offload_state_dict low_cpu_mem_usage tp_plan tp_size device_mesh distributed_config "
        "trust_remote_code code_revision adapter_kwargs adapter_name variant cache_dir ignore_mismatched_sizes "
        "return_unused_kwargs _from_auto _from_pipeline generation_config fusion_config config".split()
    )
    names = [*MiniLLMConfig.__dataclass_fields__, "rope_theta", "rope_scaling", "partial_rotary_factor"]
    assert not {key: meant for key, meant in meant_by(dict.fromkeys(arguments), names).items() if meant}


@pytest.mark.parametrize("key", ["rope_theta", "partial_rotary_factor"])
def test_an_old_spelling_is_no_override_that_is_lost(key, tmp_path):
    tiny_config(rope_theta=5e5).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"`{key}=0.5`.*rope_parameters"):
        MiniLLMConfig.from_pretrained(tmp_path, **{key: 0.5})


def test_overrides_are_checked_when_all_are_set(tmp_path):
    tiny_config().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"norm_bias=True.*norm_type='rmsnorm'"):
        MiniLLMConfig.from_pretrained(tmp_path, norm_bias=True)
    assert MiniLLMConfig.from_pretrained(tmp_path, norm_bias=True, norm_type="layernorm").norm_bias is True


def test_overrides_leave_the_dictionary_alone():
    saved = tiny_config().to_dict()
    before = json.dumps(saved)
    MiniLLMConfig.from_dict(saved, attn_implementation="eager", norm_placement="post")
    assert json.dumps(saved) == before


def test_unused_overrides_are_given_back(tmp_path):
    tiny_config().save_pretrained(tmp_path)
    config, unused = MiniLLMConfig.from_pretrained(tmp_path, norm_eps=1e-5, foo=1, return_unused_kwargs=True)
    assert config.norm_eps == 1e-5 and unused == {"foo": 1}


UNSAVABLE = {
    "contradiction": ("norm_bias", True, "norm_bias=True"),
    "object": ("note", object(), "not JSON serializable"),
    "mixed-keys": ("note", {1: 2, "a": 3}, "not supported between"),
    "dtype": ("dtype", "float33", "float33"),
    "another-file": ("configuration_files", ["config.4.json"], "configuration_files"),
    "of-other-caches": ("layer_types", ["full_attention"] * 2, "layer_types"),
}


@pytest.mark.parametrize("case", UNSAVABLE)
def test_what_could_not_be_loaded_is_not_saved(case, tmp_path):
    name, value, words = UNSAVABLE[case]
    tiny_config().save_pretrained(tmp_path)
    before = (tmp_path / "config.json").read_text()
    config = tiny_config()
    setattr(config, name, value)
    with pytest.raises(Exception, match=words):
        config.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=words):
        config.to_json_file(tmp_path / "config.json")
    assert (tmp_path / "config.json").read_text() == before


VALUES = [None, True, 0, 1, 7, -1, 0.5, math.nan, math.inf, "", "x", "float32", [], [1, 2], (1, 2), {}, {"a": 1}]
NAMES = sorted({*MiniLLMConfig.__dataclass_fields__, *KNOWN_EXTRA_KEYS, *FOREIGN_SPELLINGS, *STOCK})
# Loading reads it into another field, or fills it in.
READ_OTHERWISE = {
    *("attn_implementation", "experts_implementation", "label2id", "id2label", "num_labels"),
    *("partial_rotary_factor", "rope_theta", "minillm_version", "schema_version"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_whatever_is_assigned_is_saved_and_loaded_or_refused(name, tmp_path):
    for value in VALUES:
        config, file = tiny_config(), tmp_path / "config.json"
        file.write_text("before")
        try:
            setattr(config, name, value)
        except Exception:
            continue
        try:
            # Without the code that is written beside it.
            PreTrainedConfig.save_pretrained(config, tmp_path)
        except Exception:
            assert file.read_text() == "before"
            continue
        read = plain(MiniLLMConfig.from_pretrained(tmp_path))
        if name not in READ_OTHERWISE and value is not None:
            assert read == plain(config), value


def test_a_contradiction_is_a_value_error_when_it_is_saved(tmp_path):
    config = tiny_config()
    config.deepnorm_beta = 0.5
    with pytest.raises(ValueError, match="deepnorm_beta"):
        config.save_pretrained(tmp_path / "config")
    assert not (tmp_path / "config" / "config.json").exists()


def test_what_no_file_can_hold_is_refused_by_its_name(tmp_path):
    config = tiny_config()
    config.colours = {"red"}
    with pytest.raises(ValueError, match="`colours="):
        config.save_pretrained(tmp_path / "config")
    assert not (tmp_path / "config" / "config.json").exists()


def test_a_folder_without_a_config_is_no_model(tmp_path):
    """transformers would take its weights for those of a model of default sizes."""
    MiniLLMForCausalLM(tiny_config()).save_pretrained(tmp_path)
    (tmp_path / "config.json").unlink()
    for read in (MiniLLMConfig.from_pretrained, MiniLLMForCausalLM.from_pretrained):
        with pytest.raises(OSError, match=r"has no config\.json"):
            read(tmp_path)
