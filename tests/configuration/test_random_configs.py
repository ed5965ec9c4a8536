"""Configs drawn at random: whichever way a config comes about it is the same one, and its model has what it says."""

import copy
import json
import pickle
import tempfile
from contextlib import suppress

import torch
from hypothesis import strategies as st
from random_cases import config_fields, loud, random_test
from transformers import AutoConfig

from minillm import MiniLLMConfig, MiniLLMForCausalLM

ANY_FIELDS = st.fixed_dictionaries(
    {"vocab_size": st.sampled_from([1, 8, 11]), "hidden_size": st.integers(1, 12)},
    optional={
        "num_hidden_layers": st.integers(1, 2),
        "num_attention_heads": st.integers(1, 4),
        "num_key_value_heads": st.integers(1, 4),
        "head_dim": st.integers(1, 6),
        "intermediate_size": st.integers(1, 9),
        "max_position_embeddings": st.integers(1, 20),
        "attention_type": st.sampled_from(["causal", "prefix", "bidirectional"]),
        "sliding_window": st.integers(-1, 9),
        "position_embedding_type": st.sampled_from(
            ["rope", "alibi", "sandwich", "learned", "sinusoidal", "glm_2d", "none"]
        ),
        "position_table_size": st.integers(0, 12),
        "sandwich_dim": st.integers(0, 7),
        "alibi_scale": st.sampled_from([0, 1, 0.5, float("inf"), float("nan")]),
        "alibi_bias_max": st.sampled_from([8, 1e-3, 100.0]),
        "alibi_rounding": st.sampled_from(["none", "bloom", "falcon"]),
        "rope_interleaved": st.booleans(),
        "rope_2d": st.booleans(),
        "norm_type": st.sampled_from(["rmsnorm", "layernorm"]),
        "norm_bias": st.booleans(),
        "norm_placement": st.sampled_from(["pre", "post", "deepnorm", "sandwich"]),
        "final_norm": st.booleans(),
        "deepnorm_alpha": st.sampled_from([0, 1, 1.5]),
        "parallel_residual": st.booleans(),
        "num_parallel_norms": st.sampled_from([1, 2]),
        "mlp_type": st.sampled_from(["glu", "mlp", "moe"]),
        "hidden_act": st.sampled_from(["silu", "gtu", "bilinear", "gelu", "swish", "no_such_act"]),
        "mlp_bias": st.booleans(),
        "num_local_experts": st.integers(0, 3),
        "num_experts_per_tok": st.integers(0, 3),
        "norm_head": st.booleans(),
        "tie_word_embeddings": st.booleans(),
        "qk_norm": st.booleans(),
        "use_cache": st.booleans(),
        "embedding_norm": st.booleans(),
        "scale_residual_init": st.booleans(),
        "pad_token_id": st.integers(-1, 12),
        "sop_token_id": st.integers(0, 9),
        "mask_token_id": st.integers(0, 9),
        "attention_dropout": st.sampled_from([0, 0.5, 1, 1.5]),
    },
)
"""Fields that contradict one another more often than not."""


def written(config):
    """What a file of the config would hold, less where it was read from."""
    fields = json.loads(config.to_json_string(use_diff=False))
    return {name: value for name, value in fields.items() if name != "_name_or_path"}


@random_test(quick=200, full=8000, fields=ANY_FIELDS)
def test_any_fields_are_refused_by_name_or_make_a_model_that_runs(fields):
    try:
        config = MiniLLMConfig(**fields)
    except ValueError as error:
        assert any(f"`{name}" in str(error) for name in [*fields, "head_dim", "num_key_value_heads"]), error
        return
    model = MiniLLMForCausalLM(config).eval()
    ids = torch.zeros(2, min(3, config.position_table_size or 3), dtype=torch.long)
    with torch.no_grad():
        assert torch.isfinite(model(ids).logits).all()
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters_of(fields)


def parameters_of(fields):
    """How many parameters a config's model has, by the arithmetic of its parts."""

    def of(name, otherwise):
        return fields.get(name, otherwise)

    width, heads, layers = fields["hidden_size"], of("num_attention_heads", 32), of("num_hidden_layers", 32)
    head = of("head_dim", width // heads)
    key_heads, kind = of("num_key_value_heads", heads), of("mlp_type", "glu")
    inner = of("intermediate_size", 4 * width if kind == "mlp" else 256)
    norm_type, placement = of("norm_type", "rmsnorm"), of("norm_placement", "pre")
    norm = 2 if norm_type == "layernorm" and of("norm_bias", True) else 1
    attention = 2 * width * head * (heads + key_heads) + (2 * norm * head if of("qk_norm", False) else 0)
    if kind == "moe":
        experts = of("num_local_experts", 8)
        feed_forward = experts * (3 * inner * width + width)
    else:
        matrices = 3 if kind == "glu" else 2
        feed_forward = matrices * inner * width + (of("mlp_bias", False) and (matrices - 1) * inner + width)
    norms = 4 if placement == "sandwich" else 2
    if of("parallel_residual", False):
        norms = of("num_parallel_norms", 1)
    layer = attention + feed_forward + norms * norm * width
    scheme, length = of("position_embedding_type", "rope"), of("max_position_embeddings", 2048)
    tables = {"learned": (1, length), "glm_2d": (2, length + 1)}.get(scheme, (0, 0))
    final = of("final_norm", placement in ("pre", "sandwich"))
    words = fields["vocab_size"] * width
    return (
        words * (1 if of("tie_word_embeddings", False) else 2)
        + tables[0] * of("position_table_size", tables[1]) * width
        + layers * layer
        + norm * width * (bool(final) + of("embedding_norm", False))
    )


@random_test(quick=40, full=3000, fields=config_fields(), data=st.data())
def test_a_config_is_the_same_however_it_comes_about(fields, data):
    config = MiniLLMConfig(**fields)
    expected = written(config)
    assigned = MiniLLMConfig()
    for name in data.draw(st.permutations(sorted(fields))):
        # Fields that contradict one another on the way are judged when all are there.
        setattr(assigned, name, copy.deepcopy(fields[name]))
    assigned.validate_architecture()
    assert written(assigned) == expected
    overridden = sorted(data.draw(st.sets(st.sampled_from(sorted(fields)))))
    first = {name: value for name, value in fields.items() if name not in overridden}
    with suppress(ValueError):
        saved = MiniLLMConfig(**first).to_dict()
        assert written(MiniLLMConfig.from_dict(saved, **{name: fields[name] for name in overridden})) == expected
    for again in (
        copy.deepcopy(config),
        pickle.loads(pickle.dumps(config)),
        MiniLLMConfig.from_dict(config.to_dict()),
    ):
        assert written(again) == expected


@random_test(quick=10, full=600, fields=config_fields())
def test_a_saved_model_is_the_same(fields):
    model = loud(fields)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        loaded = MiniLLMForCausalLM.from_pretrained(folder)
        assert written(AutoConfig.from_pretrained(folder)) == written(MiniLLMConfig.from_pretrained(folder))
    assert written(loaded.config) == written(model.config)
    states = model.state_dict(), loaded.state_dict()
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
