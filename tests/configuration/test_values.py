"""Defaults, derived fields, unknown keys, stamps, and the way through JSON and back."""

import copy
import json

import pytest
from matrix_cases import POSITIONS, tiny_config
from transformers import AutoConfig, AutoModelForCausalLM, MixtralConfig

from minillm import MiniLLMConfig, MiniLLMForCausalLM, __version__
from minillm.configuration import PRESETS
from minillm.configuration.configuration_minillm import SCHEMA_VERSION
from minillm.configuration.spellings import KNOWN_EXTRA_KEYS

CONFIG_LOGGER = "minillm.configuration.configuration_minillm"


def test_defaults_are_llama_7b():
    """LLaMA (arXiv 2302.13971), table 2 and section 2.2; the released config for the rest."""
    config = MiniLLMConfig()
    expected = {
        "vocab_size": 32000,
        "hidden_size": 4096,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "head_dim": 128,
        "intermediate_size": 11008,
        "max_position_embeddings": 2048,
        "attention_type": "causal",
        "sliding_window": None,
        "position_embedding_type": "rope",
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        "rope_interleaved": False,
        "norm_type": "rmsnorm",
        "norm_eps": 1e-6,
        "norm_bias": False,
        "norm_placement": "pre",
        "final_norm": True,
        "mlp_type": "glu",
        "hidden_act": "silu",
        "use_cache": True,
        "pad_token_id": None,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "tie_word_embeddings": False,
        "initializer_range": 0.02,
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
        "embedding_dropout": 0.0,
        "attention_qkv_bias": False,
        "attention_out_bias": False,
        "mlp_bias": False,
    }
    assert {name: getattr(config, name) for name in expected} == expected


@pytest.mark.parametrize(
    ("fields", "field", "expected"),
    [
        ({"num_attention_heads": 8}, "num_key_value_heads", 8),
        ({"hidden_size": 96, "num_attention_heads": 8}, "head_dim", 12),
        ({"hidden_size": 96, "num_attention_heads": 8, "head_dim": 16}, "head_dim", 16),
        ({"hidden_size": 4096}, "intermediate_size", 11008),
        ({"hidden_size": 5120, "num_attention_heads": 40}, "intermediate_size", 13824),
        ({"hidden_size": 6656, "num_attention_heads": 52}, "intermediate_size", 17920),
        ({"hidden_size": 8192, "num_attention_heads": 64}, "intermediate_size", 22016),
        ({"hidden_size": 96, "num_attention_heads": 8}, "intermediate_size", 256),
        ({"hidden_size": 96, "num_attention_heads": 8, "mlp_type": "mlp"}, "intermediate_size", 384),
        ({"hidden_size": 4096, "mlp_type": "moe"}, "intermediate_size", 11008),
        ({"mlp_type": "moe"}, "num_local_experts", 8),
        ({"mlp_type": "moe"}, "num_experts", 8),
        ({"mlp_type": "moe"}, "num_experts_per_tok", 2),
        ({"mlp_type": "moe"}, "router_aux_loss_coef", 0.001),
        ({}, "num_experts", 0),
        ({}, "num_experts_per_tok", 0),
        ({}, "router_aux_loss_coef", 0),
        ({}, "position_table_size", None),
        ({"position_embedding_type": "learned"}, "position_table_size", 2048),
        ({"position_embedding_type": "glm_2d"}, "position_table_size", 2049),
        ({"position_embedding_type": "glm_2d", "position_table_size": 77}, "position_table_size", 77),
        ({"norm_type": "layernorm"}, "norm_bias", True),
        ({"norm_type": "layernorm", "norm_bias": False}, "norm_bias", False),
        ({"norm_placement": "sandwich"}, "final_norm", True),
        ({"norm_placement": "post"}, "final_norm", False),
        ({"norm_placement": "deepnorm"}, "final_norm", False),
        ({"norm_placement": "post", "final_norm": True}, "final_norm", True),
        ({"norm_placement": "deepnorm", "num_hidden_layers": 8}, "deepnorm_alpha", 2.0),
        ({"norm_placement": "deepnorm", "num_hidden_layers": 2}, "deepnorm_beta", 0.5),
        ({"norm_placement": "deepnorm", "deepnorm_alpha": 3}, "deepnorm_alpha", 3),
        ({}, "deepnorm_alpha", None),
        ({"attention_type": "bidirectional"}, "use_cache", False),
        ({"attention_type": "prefix"}, "use_cache", True),
        ({"use_cache": False}, "use_cache", False),
        ({"position_embedding_type": "alibi"}, "rope_parameters", None),
    ],
    ids=str,
)
def test_fields_left_out_follow_from_others(fields, field, expected):
    value = getattr(MiniLLMConfig(**fields), field)
    assert value == pytest.approx(expected) if isinstance(expected, float) else value == expected


def test_overrides_win_over_a_preset():
    config = MiniLLMConfig.from_preset("llama-3-8b", num_hidden_layers=2, rope_parameters={"rope_theta": 1e6})
    assert (config.num_hidden_layers, config.rope_parameters["rope_theta"]) == (2, 1e6)
    assert config.intermediate_size == 14336
    assert MiniLLMConfig.from_preset("llama-3-8b").num_hidden_layers == 32


def test_an_unknown_preset_is_refused_with_a_few_that_are_close():
    with pytest.raises(ValueError, match="unknown preset 'llama-3-8': did you mean 'llama-3-8b'") as caught:
        MiniLLMConfig.from_preset("llama-3-8")
    assert "minillm presets" in str(caught.value)
    assert sum(repr(name) in str(caught.value) for name in PRESETS) <= 3
    with pytest.raises(ValueError, match="unknown preset 'zzz': `minillm presets`") as caught:
        MiniLLMConfig.from_preset("zzz")
    assert "did you mean" not in str(caught.value)


def test_unknown_keys_are_kept_with_one_warning(caplog, tmp_path):
    for _ in range(2):
        config = tiny_config(training_note="second run", corpus_hash=7)
    assert (config.training_note, config.corpus_hash) == ("second run", 7)
    (line,) = [record.getMessage() for record in caplog.records if "training_note" in record.getMessage()]
    assert "['corpus_hash', 'training_note']" in line
    config.save_pretrained(tmp_path)
    assert MiniLLMConfig.from_pretrained(tmp_path).training_note == "second run"


# Values that transformers checks, or acts on, when it is given them.
EXTRA_VALUES = {
    "add_cross_attention": False,
    "cross_attention_hidden_size": None,
    "tie_encoder_decoder": False,
    "model_type": "minillm",
    "auto_map": {},
    "attn_implementation": "eager",
    "experts_implementation": None,
    "output_attentions": False,
    "quantization_config": {},
    "torch_dtype": "float32",
    "rope_theta": 10000.0,
    "rope_scaling": None,
    "partial_rotary_factor": 1.0,
    "per_layer_config": None,
    "num_labels": 3,
    "pruned_heads": {},
}


@pytest.mark.parametrize("key", sorted(KNOWN_EXTRA_KEYS))
def test_keys_of_transformers_pass_silently(key, caplog):
    tiny_config(**{key: EXTRA_VALUES.get(key, 1)})
    assert not [record for record in caplog.records if "unknown keys" in record.getMessage()]


def test_private_keys_pass_silently(caplog):
    tiny_config(_some_client_s_mark=1)
    assert not caplog.records


def test_every_config_is_stamped():
    for config in (tiny_config(), tiny_config(minillm_version="0.0.1"), tiny_config(schema_version=SCHEMA_VERSION)):
        assert (config.minillm_version, config.schema_version) == (__version__, SCHEMA_VERSION)


def test_a_newer_schema_is_refused_with_the_line_that_helps(tmp_path):
    tiny_config().save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    assert (written["minillm_version"], written["schema_version"]) == (__version__, SCHEMA_VERSION)
    written |= {"schema_version": SCHEMA_VERSION + 1, "minillm_version": "99.1"}
    (tmp_path / "config.json").write_text(json.dumps(written))
    for load in (MiniLLMConfig.from_pretrained, AutoConfig.from_pretrained, AutoModelForCausalLM.from_pretrained):
        with pytest.raises(ValueError, match="pip install -U minillm-hf") as caught:
            load(tmp_path)
        assert f"schema_version={SCHEMA_VERSION + 1}" in str(caught.value) and "99.1" in str(caught.value)


LONG = {"rope_theta": 100.0, "factor": 2.0}
VARIANTS = {
    **{f"preset-{name}": PRESETS[name].fields for name in "gpt2 falcon-rw-1b llama-3.1-8b glm-130b glm-4-9b".split()},
    **{f"positions-{name}": fields for name, fields in POSITIONS.items()},
    "integers-for-floats": {
        "norm_eps": 1,
        "attention_dropout": 0,
        "initializer_range": 1,
        "embedding_gradient_scale": 1,
        "rope_theta": 500000,
    },
    "yarn": {"rope_parameters": {**LONG, "rope_type": "yarn", "beta_fast": 16}},
    "llama3": {"rope_scaling": {**LONG, "rope_type": "llama3", "low_freq_factor": 1, "high_freq_factor": 4.0}},
    "longrope": {
        "rope_parameters": {**LONG, "rope_type": "longrope", "short_factor": [1.0] * 64, "long_factor": [1.3] * 64}
    },
    "deepnorm": {"norm_placement": "deepnorm", "norm_type": "layernorm"},
    "deepnorm-set": {"norm_placement": "deepnorm", "deepnorm_alpha": 3, "deepnorm_beta": 0.1},
    "parallel": {"parallel_residual": True, "num_parallel_norms": 2},
    "bidirectional": {"attention_type": "bidirectional", "sliding_window": 7},
    "prompt-is-not-prefix": {"attention_type": "prefix", "prompt_is_prefix": False},
    "many-ends": {"eos_token_id": [2, 5], "pad_token_id": 0, "bos_token_id": None},
    "labels": {"id2label": {0: "no", 1: "yes", 2: "maybe"}, "problem_type": "multi_label_classification"},
    "dtype": {"dtype": "bfloat16"},
    "unknown-keys": {"note": {"a": [1, 2.5, None, "ü"]}},
    "exact-floats": {"norm_eps": 1.1e-7, "initializer_range": 0.1 + 0.2},
}


def without_place(fields):
    """A saved folder adds where its code is, and a loader where it was."""
    return {key: value for key, value in fields.items() if key not in ("auto_map", "_name_or_path")}


@pytest.mark.parametrize("name", VARIANTS)
def test_the_way_through_json_is_exact(name, tmp_path):
    config = MiniLLMConfig(**VARIANTS[name])
    expected = config.to_dict()
    config.save_pretrained(tmp_path)
    read = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    again = {
        "save_pretrained": MiniLLMConfig.from_pretrained(tmp_path),
        "AutoConfig": AutoConfig.from_pretrained(tmp_path),
        "json_file": MiniLLMConfig.from_json_file(tmp_path / "config.json"),
        "from_dict": MiniLLMConfig.from_dict(expected),
        "to_json_string": MiniLLMConfig.from_dict(json.loads(config.to_json_string(use_diff=False))),
        "to_diff_dict": MiniLLMConfig.from_dict(config.to_diff_dict()),
        "keywords": MiniLLMConfig(**{key: value for key, value in read.items() if key != "model_type"}),
        "deepcopy": copy.deepcopy(config),
    }
    for way, other in again.items():
        assert type(other) is MiniLLMConfig, way
        assert without_place(other.to_dict()) == without_place(expected), way
        for field in MiniLLMConfig.__annotations__:
            value, wanted = getattr(other, field), getattr(config, field)
            assert (value, type(value)) == (wanted, type(wanted)), f"{way}: {field}"


def test_a_copy_shares_nothing():
    config = tiny_config(eos_token_id=[2, 3])
    other = copy.deepcopy(config)
    other.rope_parameters["rope_theta"] = 1.0
    other.eos_token_id.append(4)
    assert config.rope_parameters["rope_theta"] == 10000.0 and config.eos_token_id == [2, 3]


def test_two_configs_share_no_dictionary():
    rope = {"rope_theta": 5e5}
    first, second = tiny_config(rope_parameters=rope), tiny_config(rope_parameters=rope)
    first.rope_parameters["rope_theta"] = 1.0
    assert second.rope_parameters["rope_theta"] == rope["rope_theta"] == 5e5


@pytest.mark.parametrize("left_out", list(MiniLLMConfig.__annotations__))
def test_a_file_of_an_older_version_lacks_a_field(left_out, tmp_path):
    """What a file does not say has its default, as before the field existed."""
    config = tiny_config()
    config.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    written.pop(left_out, None)
    del written["derived_fields"]
    (tmp_path / "config.json").write_text(json.dumps(written))
    read = MiniLLMConfig.from_pretrained(tmp_path)
    from_size = {"vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size"}
    if left_out in from_size | {"max_position_embeddings"}:
        default = MiniLLMConfig.__dataclass_fields__[left_out].default
        assert getattr(read, left_out) == (256 if left_out == "intermediate_size" else default)
    else:
        assert read.to_dict() == MiniLLMConfig.from_dict(written | {left_out: getattr(config, left_out)}).to_dict()


def test_what_follows_from_other_fields_is_filled_in_again_when_a_model_is_built():
    for changes in (
        {"norm_placement": "deepnorm"},
        {"position_embedding_type": "learned", "rope_parameters": None},
        {"head_dim": None, "intermediate_size": None, "num_key_value_heads": None},
    ):
        config = MiniLLMConfig(vocab_size=32, hidden_size=32, num_hidden_layers=1, num_attention_heads=2)
        for name, value in changes.items():
            setattr(config, name, value)
        MiniLLMForCausalLM(config)
        assert None not in [getattr(config, name) for name in changes if name != "rope_parameters"]
    assert config.head_dim == 16 and config.num_key_value_heads == 2


def test_a_plan_of_the_users_own_stays():
    config = MiniLLMConfig(vocab_size=32, hidden_size=32, num_hidden_layers=1, num_attention_heads=2)
    config.mlp_type = "mlp"
    config.validate_architecture()
    assert not any("gate_proj" in name for name in config.base_model_tp_plan)
    config.base_model_tp_plan = {"layers.*.mlp.up_proj": "colwise"}
    config.validate_architecture()
    assert config.base_model_tp_plan == {"layers.*.mlp.up_proj": "colwise"}


@pytest.mark.parametrize(
    ("wrong", "meant"),
    [("rope_thata", "rope_theta"), ("rope_scalling", "rope_scaling"), ("rope_thetas", "rope_theta")],
)
def test_a_misspelt_old_spelling_is_refused(wrong, meant):
    with pytest.raises(ValueError, match=f"{wrong}.*{meant}"):
        MiniLLMConfig(**{wrong: 5e5})


def test_the_tensor_parallel_plan_follows_the_feed_forward():
    gated, plain = tiny_config().base_model_tp_plan, tiny_config(mlp_type="mlp").base_model_tp_plan
    assert set(gated) - set(plain) == {"layers.*.mlp.gate_proj"}
    assert {name for name, style in gated.items() if style == "rowwise"} == {
        "layers.*.self_attn.o_proj",
        "layers.*.mlp.down_proj",
    }
    assert tiny_config(mlp_type="moe").base_model_tp_plan == MixtralConfig.base_model_tp_plan
