"""A changed config is the one that would have been made so, or is refused: it never becomes another model."""

import copy
import json
import pickle

import pytest
import torch
from matrix_cases import SIZES
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig

from minillm import MiniLLMConfig, MiniLLMForCausalLM
from minillm.configuration.derived_fields import DERIVED

SAVED_ONLY = ("auto_map", "_name_or_path")


def tiny_config(**fields):
    sizes = {name: value for name, value in SIZES.items() if name not in DERIVED}
    return MiniLLMConfig(**{**sizes, **fields})


def plain(config):
    return {key: value for key, value in config.to_dict().items() if key not in SAVED_ONLY}


def result(make):
    """The config's fields, or that it was refused."""
    try:
        config = make()
        config.validate_architecture()
    except ValueError:
        return "refused"
    return plain(config)


def assign(config, fields):
    for name, value in fields.items():
        setattr(config, name, value)
    return config


def assign_backwards(config, fields):
    return assign(config, dict(reversed(fields.items())))


def update(config, fields):
    config.update(fields)
    return config


def saved_and_overridden(config, fields, folder):
    # Without the code that `save_pretrained` writes beside it.
    config.to_json_file(folder / "config.json")
    return MiniLLMConfig.from_pretrained(folder, **copy.deepcopy(fields))


def saved_and_overridden_by_auto(config, fields, folder):
    config.to_json_file(folder / "config.json")
    return AutoConfig.from_pretrained(folder, **copy.deepcopy(fields))


def edited(config, fields, folder):
    config.to_json_file(folder / "config.json")
    written = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**written, **fields}))
    return MiniLLMConfig.from_pretrained(folder)


WAYS = {
    "assigned": lambda config, fields, folder: assign(config, fields),
    "assigned backwards": lambda config, fields, folder: assign_backwards(config, fields),
    "updated": lambda config, fields, folder: update(config, fields),
    "deepcopy": lambda config, fields, folder: assign(copy.deepcopy(config), fields),
    "copy": lambda config, fields, folder: assign(copy.copy(config), fields),
    "pickle": lambda config, fields, folder: assign(pickle.loads(pickle.dumps(config)), fields),
    "from_dict": lambda config, fields, folder: MiniLLMConfig.from_dict(config.to_dict(), **copy.deepcopy(fields)),
    "from_dict of the diff": lambda config, fields, folder: MiniLLMConfig.from_dict(config.to_diff_dict(), **fields),
    "from_pretrained": saved_and_overridden,
    "AutoConfig": saved_and_overridden_by_auto,
    "merged dictionary": lambda config, fields, folder: MiniLLMConfig(**{**config.to_dict(), **fields}),
    "updated with a merged dictionary": lambda config, fields, folder: update(
        tiny_config(), {**{key: value for key, value in config.to_dict().items() if key != "model_type"}, **fields}
    ),
    "edited file": edited,
    "saved twice": lambda config, fields, folder: saved_and_overridden(
        saved_and_overridden(config, {}, folder), fields, folder
    ),
}

# What was typed when the config was made.
TYPED = {
    "nothing": {},
    "sizes": {"head_dim": 16, "intermediate_size": 48, "num_key_value_heads": 2},
    "the derived values": {"head_dim": 8, "intermediate_size": 256, "final_norm": True, "use_cache": True},
    "layernorm": {"norm_type": "layernorm"},
    "layernorm-bare": {"norm_type": "layernorm", "norm_bias": False},
    "layernorm-biased": {"norm_type": "layernorm", "norm_bias": True},
    "post": {"norm_placement": "post"},
    "post-final": {"norm_placement": "post", "final_norm": True},
    "deepnorm": {"norm_placement": "deepnorm"},
    "deepnorm-alpha": {"norm_placement": "deepnorm", "deepnorm_alpha": 3.0},
    "learned": {"position_embedding_type": "learned"},
    "learned-table": {"position_embedding_type": "learned", "position_table_size": 40},
    "alibi": {"position_embedding_type": "alibi"},
    "rope": {"rope_parameters": {"rope_theta": 5e5}},
    "default-rope": {"rope_parameters": {"rope_theta": 1e4}},
    "yarn": {"rope_parameters": {"rope_theta": 1e4, "rope_type": "yarn", "factor": 2.0}},
    "mlp": {"mlp_type": "mlp", "hidden_act": "gelu"},
    "moe": {"mlp_type": "moe"},
    "moe-experts": {"mlp_type": "moe", "num_local_experts": 4},
    "encoder": {"attention_type": "bidirectional"},
    "no-cache": {"use_cache": False},
}
CHANGES = [
    {"num_attention_heads": 8},
    {"num_attention_heads": 3, "hidden_size": 48},
    {"num_attention_heads": 5},
    {"hidden_size": 64},
    {"hidden_size": 64, "head_dim": 8},
    {"mlp_type": "mlp", "hidden_act": "gelu"},
    {"mlp_type": "moe"},
    {"mlp_type": "glu"},
    {"norm_type": "layernorm"},
    {"norm_type": "rmsnorm"},
    *({"norm_placement": value} for value in ("pre", "post", "deepnorm", "sandwich")),
    {"num_hidden_layers": 7},
    {"norm_placement": "deepnorm", "num_hidden_layers": 7},
    *({"position_embedding_type": value} for value in ("rope", "alibi", "learned", "glm_2d", "none")),
    {"position_embedding_type": "learned", "max_position_embeddings": 64},
    *({"attention_type": value} for value in ("causal", "prefix", "bidirectional")),
    {"qk_norm": True},
    {"rope_parameters": {"rope_theta": 7e5}},
    {"rope_parameters": {"rope_theta": 1e4, "rope_type": "linear", "factor": 2.0}},
    *({name: None} for name in DERIVED),
    {"num_local_experts": 3, "mlp_type": "moe"},
]


def test_every_derived_field_and_owner_is_changed():
    changed = {name for change in CHANGES for name in change}
    assert changed >= set(DERIVED) | {owner for rule in DERIVED.values() for owner in rule.owners}


MERGED = ("merged dictionary", "updated with a merged dictionary", "edited file")


QUICK = ("assigned", "from_pretrained", "merged dictionary")


@pytest.mark.parametrize("change", CHANGES, ids=str)
@pytest.mark.parametrize("way", [way if way in QUICK else pytest.param(way, marks=pytest.mark.slow) for way in WAYS])
def test_a_changed_config_is_the_one_that_would_have_been_made_so(way, change, tmp_path):
    for name, typed in TYPED.items():
        config, wanted = tiny_config(**typed), {**typed, **copy.deepcopy(change)}
        if way in MERGED:
            # Nothing in a dictionary tells a value that is written into it from the equal one that was there.
            again = {key: value for key, value in change.items() if config.derived_fields.get(key) == value}
            if again and any(value is not None for value in again.values()):
                continue
        expected = result(lambda wanted=wanted: tiny_config(**wanted))
        got = result(lambda config=config: WAYS[way](config, copy.deepcopy(change), tmp_path))
        assert got == expected, name


def test_what_was_set_is_in_the_file_beside_concrete_values(tmp_path):
    tiny_config(head_dim=16, norm_placement="deepnorm").save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    assert (written["head_dim"], written["num_key_value_heads"], written["final_norm"]) == (16, 4, False)
    assert (
        written["derived_fields"]
        == {
            "num_key_value_heads": 4,
            "intermediate_size": 256,
            "num_local_experts": 0,
            "num_experts_per_tok": 0,
            "router_aux_loss_coef": 0,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
            "norm_bias": False,
            "final_norm": False,
            "deepnorm_alpha": 4**0.25,
            "deepnorm_beta": 16**-0.25,
            "use_cache": True,
        }
        or "intermediate_size" in SIZES
    )


@pytest.mark.parametrize("way", [way for way in WAYS if "dictionary" not in way and way != "edited file"])
def test_a_typed_value_stays_though_it_is_the_derived_one(way, tmp_path):
    config = WAYS[way](tiny_config(head_dim=8), {"hidden_size": 64}, tmp_path)
    assert (config.head_dim, tiny_config(hidden_size=64).head_dim) == (8, 16)
    config = WAYS[way](tiny_config(), {"head_dim": 8, "hidden_size": 64}, tmp_path)
    assert config.head_dim == 8


def test_an_edited_value_is_set():
    saved = tiny_config().to_dict()
    assert MiniLLMConfig.from_dict({**saved, "head_dim": 12}).head_dim == 12
    assert MiniLLMConfig.from_dict({**saved, "head_dim": 12}, hidden_size=64).head_dim == 12


def test_an_owner_is_followed_at_once():
    config = tiny_config()
    config.norm_placement = "post"
    assert config.final_norm is False
    config.norm_type = "layernorm"
    assert config.norm_bias is True
    config.position_embedding_type = "learned"
    assert (config.position_table_size, config.rope_parameters) == (32, None)
    config.position_embedding_type = "rope"
    assert (config.position_table_size, config.rope_parameters["rope_theta"]) == (None, 10000.0)
    config.mlp_type = "moe"
    assert (config.num_experts, config.base_model_tp_plan["layers.*.mlp.experts"]) == (8, "moe_tp_experts")
    config.num_attention_heads = 5
    assert config.head_dim is None
    config.hidden_size = 40
    assert config.head_dim == 8


def test_an_alias_is_checked_like_its_field():
    config = tiny_config(mlp_type="moe")
    config.num_experts = 3
    assert config.num_local_experts == 3 and "num_local_experts" not in config.derived_fields
    with pytest.raises(Exception, match="num_local_experts"):
        config.num_experts = "three"


CONTRADICTIONS = [
    (
        {"norm_type": "layernorm", "norm_bias": True},
        {"norm_type": "rmsnorm"},
        ["norm_bias=True", "norm_type='rmsnorm'"],
    ),
    ({"num_key_value_heads": 4}, {"num_attention_heads": 2}, ["num_attention_heads=2", "num_key_value_heads=4"]),
    ({"mlp_type": "moe", "num_local_experts": 4}, {"mlp_type": "glu"}, ["num_local_experts=4", "mlp_type='glu'"]),
    (
        {"norm_placement": "deepnorm", "deepnorm_alpha": 3.0},
        {"norm_placement": "pre"},
        ["deepnorm_alpha=3.0", "norm_placement='pre'"],
    ),
    (
        {"position_embedding_type": "learned", "position_table_size": 40},
        {"position_embedding_type": "none"},
        ["position_table_size=40", "position_embedding_type='none'"],
    ),
    (
        {"rope_theta": 5e5},
        {"position_embedding_type": "alibi"},
        ["rope_parameters=", "position_embedding_type='alibi'"],
    ),
    ({"use_cache": True}, {"attention_type": "bidirectional"}, ["use_cache=True", "attention_type='bidirectional'"]),
]


@pytest.mark.parametrize(("typed", "change", "words"), CONTRADICTIONS, ids=str)
@pytest.mark.parametrize("way", ["assigned", "from_pretrained", "AutoConfig", "from_dict"])
def test_a_value_that_was_set_and_no_longer_fits_is_refused_by_both_names(typed, change, words, way, tmp_path):
    with pytest.raises(ValueError) as caught:
        WAYS[way](tiny_config(**typed), change, tmp_path).validate_architecture()
    assert all(word in str(caught.value) for word in words)


# Files of versions that did not write what they derived.


def older(config, **fields):
    written = json.loads(config.to_json_string(use_diff=False))
    del written["derived_fields"]
    return {**written, **fields}


@pytest.mark.parametrize("typed", TYPED)
def test_an_older_file_is_the_same_model(typed):
    config = tiny_config(**TYPED[typed])
    read = MiniLLMConfig.from_dict(older(config))
    expected, got = plain(config), plain(read)
    assert {key: got[key] for key in got if key != "derived_fields"} == {
        key: expected[key] for key in expected if key != "derived_fields"
    }


@pytest.mark.parametrize(
    ("edits", "change", "field", "expected"),
    [
        ({}, {"norm_placement": "post"}, "final_norm", False),
        ({}, {"hidden_size": 64}, "head_dim", 16),
        ({"head_dim": 12}, {"hidden_size": 64}, "head_dim", 12),
        ({"num_key_value_heads": 2}, {"num_attention_heads": 8}, "num_key_value_heads", 2),
        ({"final_norm": False}, {"norm_placement": "sandwich"}, "final_norm", False),
        ({"norm_placement": "post", "final_norm": True}, {}, "final_norm", True),
        ({"norm_placement": "deepnorm", "deepnorm_alpha": 9.0}, {"num_hidden_layers": 7}, "deepnorm_alpha", 9.0),
        ({"norm_type": "layernorm"}, {}, "norm_bias", False),
        ({"use_cache": False}, {"attention_type": "prefix"}, "use_cache", False),
        ({"rope_parameters": {"rope_theta": 5e5}}, {}, "rope_parameters", {"rope_type": "default", "rope_theta": 5e5}),
        ({}, {"position_embedding_type": "none"}, "rope_parameters", None),
    ],
    ids=str,
)
def test_in_an_older_file_what_differs_from_its_rule_counts_as_set(edits, change, field, expected):
    assert getattr(MiniLLMConfig.from_dict(older(tiny_config(), **edits), **change), field) == expected


def test_a_power_that_another_machine_rounded_otherwise_stays_derived():
    config = tiny_config(norm_placement="deepnorm")
    alpha = config.deepnorm_alpha * (1 + 1e-15)
    assert alpha != config.deepnorm_alpha
    read = MiniLLMConfig.from_dict(older(config, deepnorm_alpha=alpha))
    assert read.deepnorm_alpha == alpha
    read.num_hidden_layers = 7
    assert read.deepnorm_alpha == 14**0.25


def test_a_pickle_of_an_older_version_is_the_same_model():
    config = tiny_config(norm_placement="post", head_dim=16)
    expected = plain(config)
    del vars(config)["derived_fields"]
    old = MiniLLMForCausalLM(pickle.loads(pickle.dumps(config))).config
    assert plain(old)["derived_fields"] == expected["derived_fields"]
    assert {key: value for key, value in plain(old).items() if key in expected} == expected


def test_presets_count_as_set():
    config = MiniLLMConfig.from_preset("llama-3-8b", num_attention_heads=16)
    assert (config.num_key_value_heads, config.head_dim) == (8, 256)
    assert MiniLLMConfig.from_preset("gpt2", norm_placement="post").final_norm is False
    with pytest.raises(ValueError, match=r"deepnorm_alpha.*norm_placement='pre'"):
        MiniLLMConfig.from_preset("glm-130b", norm_placement="pre")


# What transformers and others write into a config.


def test_a_loaded_model_is_the_overridden_one(tmp_path):
    MiniLLMForCausalLM(tiny_config()).save_pretrained(tmp_path)
    model, report = AutoModelForCausalLM.from_pretrained(tmp_path, norm_placement="post", output_loading_info=True)
    assert not report["missing_keys"] and report["unexpected_keys"] == {"model.norm.weight"}
    assert {name for name, _ in model.named_parameters()} == {
        name for name, _ in MiniLLMForCausalLM(tiny_config(norm_placement="post")).named_parameters()
    }


def test_writes_of_transformers_set_nothing_else(tmp_path):
    config = tiny_config(norm_placement="deepnorm")
    before = copy.deepcopy(config.derived_fields)
    model = MiniLLMForCausalLM(config)
    model.set_attn_implementation("eager")
    model.resize_token_embeddings(24)
    config.pad_token_id = config.eos_token_id = 3
    config.tie_word_embeddings = True
    config.return_dict, config.output_hidden_states = False, True
    assert config.derived_fields == before
    model.save_pretrained(tmp_path)
    assert MiniLLMConfig.from_pretrained(tmp_path).derived_fields == before
    # Early exit takes the first layers of a model for the time of a draft.
    alpha, layers = config.deepnorm_alpha, config.num_hidden_layers
    config.num_hidden_layers = 1
    config.num_hidden_layers = layers
    assert (config.deepnorm_alpha, config.derived_fields) == (alpha, before)


def test_early_exit_decodes_as_the_model_alone():
    torch.manual_seed(0)
    model = MiniLLMForCausalLM(tiny_config(norm_placement="deepnorm", eos_token_id=None)).eval()
    before, prompt = plain(model.config), torch.tensor([[3, 4, 5, 6]])
    expected = model.generate(prompt, max_new_tokens=6, do_sample=False)
    got = model.generate(prompt, max_new_tokens=6, do_sample=False, assistant_early_exit=1)
    assert torch.equal(got, expected) and plain(model.config) == before


def test_reading_is_stock():
    """Every forward reads the config."""
    assert MiniLLMConfig.__getattribute__ is PreTrainedConfig.__getattribute__


def test_two_copies_share_no_record():
    config = tiny_config()
    other = copy.copy(config)
    other.head_dim = 12
    config.hidden_size = 64
    assert (config.head_dim, other.head_dim, other.hidden_size) == (16, 12, 32)


def test_a_record_must_be_a_dictionary():
    with pytest.raises(ValueError, match="derived_fields=3"):
        tiny_config(derived_fields=3)
