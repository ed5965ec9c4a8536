"""No field of the config is ever silently ignored: each one is flipped, and something must change."""

import pytest
import torch
from matrix_cases import VOCAB, batch, tiny_config
from native_families import fill_loudly

from minillm import MiniLLMConfig, MiniLLMForCausalLM

PREFIX = {"attention_type": "prefix"}
ALIBI = {"position_embedding_type": "alibi"}
LEARNED = {"position_embedding_type": "learned"}
DEEPNORM = {"norm_placement": "deepnorm"}
MOE = {"mlp_type": "moe", "num_local_experts": 4}
ROPE = {"rope_type": "default", "rope_theta": 10000.0}
LONG = {"rope_theta": 10000.0, "factor": 2.0}
LISTS = {"short_factor": [1.0, 1.1, 1.2, 1.3], "long_factor": [1.5, 2.0, 2.5, 3.0]}
# Positions at which bfloat16 no longer tells neighbours apart.
MASK, OTHER_MASK, SOP, OTHER_SOP = 3, 4, 5, 6
BLANKS = {**PREFIX, "mask_token_id": MASK, "sop_token_id": SOP}
ANSWER, OTHER_ANSWER, USER, OTHER_USER = 5, 6, 7, 8
CHAT = {**PREFIX, "answer_start_token_id": ANSWER, "turn_token_ids": [ANSWER, USER]}
FAR = torch.tensor([[3001, 3003, 3005, 3010, 3013, 3019, 3020, 3024, 3029, 3033]])


def shapes_of(config):
    with torch.device("meta"):
        return {name: tuple(tensor.shape) for name, tensor in MiniLLMForCausalLM(config).named_parameters()}


def fresh(config):
    torch.manual_seed(0)
    return MiniLLMForCausalLM(config)


def loud(config):
    return fill_loudly(fresh(config))


def differ(tensors, others, least=1e-3):
    return any((tensor - other).abs().max() > least for tensor, other in zip(tensors, others, strict=True))


def without_logits(base, changed):
    """Whether training steps return logits."""
    returned = []
    for config in (base, changed):
        inputs = batch(config, "plain")
        returned.append(loud(config).train()(**inputs, labels=inputs["input_ids"]).logits is not None)
    return returned == [True, False]


def shapes(base, changed):
    return shapes_of(base) != shapes_of(changed)


def outputs(base, changed, dtype=torch.float32, **extra):
    assert not shapes(base, changed), "the logits would differ for lack of the same weights"
    with torch.no_grad():
        logits = [loud(config).to(dtype)(**{**batch(config, "plain"), **extra}).logits for config in (base, changed)]
    return differ(*([each] for each in logits))


def far_outputs(base, changed):
    return outputs(base, changed, torch.bfloat16, position_ids=FAR, attention_mask=torch.ones(2, 10))


def initialisation(base, changed):
    assert not shapes(base, changed)
    return differ(*([tensor for _, tensor in fresh(config).named_parameters()] for config in (base, changed)))


def gradients(base, changed):
    found = []
    for config in (base, changed):
        model = loud(config).train()
        model(**batch(config, "plain"), labels=batch(config, "plain")["input_ids"]).loss.backward()
        found.append([parameter.grad for parameter in model.parameters()])
    return differ(*found)


def losses(base, changed):
    """Also of a model that is asked for its router's loss."""
    found = []
    for config in (base, changed):
        inputs = batch(config, "plain")
        wants_router = config.mlp_type == "moe" or None
        outputs = loud(config)(**inputs, labels=inputs["input_ids"], output_router_logits=wants_router)
        found.append([outputs.loss.detach()])
    return differ(*found)


def recorded(base, changed):
    first, second = (loud(config)(**batch(config, "plain")) for config in (base, changed))
    return ("router_logits" in first) != ("router_logits" in second)


def training_outputs(base, changed):
    found = []
    for config in (base, changed):
        model = loud(config).train()
        torch.manual_seed(2)
        with torch.no_grad():
            found.append([model(**batch(config, "plain")).logits])
    return differ(*found)


def generated(base, changed):
    """Greedy continuations, and their logits."""
    assert not shapes(base, changed)
    found = []
    for config in (base, changed):
        prompt = batch(config, "plain")["input_ids"]
        run = loud(config).generate(
            prompt, max_new_tokens=6, do_sample=False, return_dict_in_generate=True, output_logits=True
        )
        found.append(run)
    first, second = found
    if first.sequences.shape != second.sequences.shape:
        return True
    return differ([first.sequences, *first.logits], [second.sequences, *second.logits])


def filled(base, changed):
    """What is put into a blank of a prompt with several tokens that could be blanks and starts."""
    found = []
    for config in (base, changed):
        prompt = batch(config, "plain")["input_ids"].clamp(min=9)
        prompt[:, 2], prompt[:, 3], prompt[:, 6], prompt[:, -1] = MASK, OTHER_MASK, OTHER_SOP, SOP
        options = {"max_new_tokens": 3, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
        found.append(loud(config).generate(prompt, **options).logits)
    return differ(*found)


def chatted(base, changed):
    """What follows a conversation with several tokens that could start answers and turns."""
    found = []
    for config in (base, changed):
        prompt = batch(config, "plain")["input_ids"].clamp(min=9)
        prompt[:, 1], prompt[:, 3], prompt[:, 5], prompt[:, 7] = OTHER_ANSWER, ANSWER, OTHER_USER, USER
        options = {"max_new_tokens": 3, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
        found.append(loud(config).generate(prompt, **options).logits)
    return differ(*found)


def started(base, changed):
    """What `generate()` begins with when it is given nothing."""
    first, second = (loud(config).generate(max_new_tokens=2, do_sample=False) for config in (base, changed))
    return first[0, 0] != second[0, 0]


def cached(base, changed):
    first, second = (loud(config)(**batch(config, "plain")).past_key_values for config in (base, changed))
    return (first is None) != (second is None)


def stamped(base, changed):
    """Not a choice but a stamp, which is written anew."""
    return base.to_dict() == changed.to_dict() and changed.minillm_version == tiny_config().minillm_version


END = int(loud(tiny_config()).generate(batch(tiny_config(), "plain")["input_ids"], max_new_tokens=2)[0, 11])

# (field, fields of the base, another value, what must change)
FLIPS = [
    ("vocab_size", {}, 23, shapes),
    ("hidden_size", {}, 48, shapes),
    ("num_hidden_layers", {}, 3, shapes),
    ("num_attention_heads", {"head_dim": 8}, 8, shapes),
    ("num_key_value_heads", {}, 2, shapes),
    ("head_dim", {}, 12, shapes),
    ("intermediate_size", {}, 40, shapes),
    ("max_position_embeddings", LEARNED, 64, shapes),
    ("max_position_embeddings", {"position_embedding_type": "glm_2d"}, 64, shapes),
    ("max_position_embeddings", {"rope_parameters": {**LONG, "rope_type": "dynamic"}}, 4, outputs),
    ("max_position_embeddings", {"rope_parameters": {**LONG, **LISTS, "rope_type": "longrope"}}, 4, outputs),
    ("attention_type", {}, "bidirectional", outputs),
    ("attention_type", {}, "prefix", outputs),
    ("sliding_window", {}, 3, outputs),
    ("prompt_is_prefix", PREFIX, False, generated),
    ("answer_start_token_id", CHAT, OTHER_ANSWER, chatted),
    ("turn_token_ids", CHAT, [ANSWER, USER, OTHER_USER], chatted),
    ("qk_norm", {}, True, shapes),
    ("attention_qkv_bias", {}, True, shapes),
    ("attention_out_bias", {}, True, shapes),
    ("attention_dropout", {}, 0.5, training_outputs),
    ("position_embedding_type", {}, "alibi", outputs),
    ("position_embedding_type", {}, "sandwich", outputs),
    ("position_embedding_type", {}, "learned", shapes),
    ("position_embedding_type", {}, "sinusoidal", outputs),
    ("position_embedding_type", {}, "none", outputs),
    ("position_embedding_type", LEARNED, "glm_2d", shapes),
    ("rope_parameters", {}, {**ROPE, "rope_theta": 100.0}, outputs),
    ("rope_parameters", {}, {**ROPE, "partial_rotary_factor": 0.5}, outputs),
    ("rope_parameters", {}, {"rope_type": "linear", "factor": 2.0}, outputs),
    ("rope_parameters", {}, {"rope_type": "ntk", "factor": 2.0}, outputs),
    ("rope_interleaved", {}, True, outputs),
    ("rope_2d", {}, True, outputs),
    ("position_table_size", LEARNED, 40, shapes),
    ("position_table_size", {"position_embedding_type": "glm_2d"}, 40, shapes),
    ("alibi_scale", ALIBI, 2.0, outputs),
    ("alibi_bias_max", ALIBI, 4.0, outputs),
    ("alibi_rounding", ALIBI, "bloom", far_outputs),
    ("alibi_rounding", ALIBI, "falcon", far_outputs),
    ("sandwich_dim", {"position_embedding_type": "sandwich"}, 6, outputs),
    ("norm_type", {"norm_bias": False}, "layernorm", outputs),
    ("norm_eps", {}, 0.1, outputs),
    ("norm_bias", {"norm_type": "layernorm"}, False, shapes),
    ("norm_placement", {"final_norm": True}, "post", outputs),
    ("norm_placement", {"final_norm": True}, "deepnorm", outputs),
    ("norm_placement", {}, "sandwich", shapes),
    ("final_norm", {}, False, shapes),
    ("deepnorm_alpha", DEEPNORM, 3.0, outputs),
    ("deepnorm_beta", DEEPNORM, 0.9, initialisation),
    ("parallel_residual", {}, True, shapes),
    ("num_parallel_norms", {"parallel_residual": True}, 2, shapes),
    ("mlp_type", {}, "mlp", shapes),
    ("hidden_act", {}, "gelu", outputs),
    ("hidden_act", {}, "gtu", outputs),
    ("hidden_act", {}, "bilinear", outputs),
    ("mlp_bias", {}, True, shapes),
    ("mlp_type", {}, "moe", shapes),
    ("num_local_experts", MOE, 3, shapes),
    ("num_experts_per_tok", MOE, 1, outputs),
    ("num_experts_per_tok", MOE, 3, outputs),
    ("router_aux_loss_coef", MOE, 0.1, losses),
    ("router_jitter_noise", MOE, 0.5, training_outputs),
    ("output_router_logits", MOE, True, recorded),
    ("embedding_norm", {}, True, shapes),
    ("embedding_gradient_scale", {}, 0.1, gradients),
    ("norm_head", {}, True, outputs),
    ("hidden_dropout", {}, 0.5, training_outputs),
    ("embedding_dropout", {}, 0.5, training_outputs),
    ("initializer_range", {}, 0.1, initialisation),
    ("scale_residual_init", {}, True, initialisation),
    ("use_cache", {}, False, cached),
    ("skip_logits", {}, True, without_logits),
    ("pad_token_id", {"eos_token_id": END, "pad_token_id": 0}, 5, generated),
    ("bos_token_id", {}, 7, started),
    ("eos_token_id", {"pad_token_id": 0}, END, generated),
    ("mask_token_id", BLANKS, OTHER_MASK, filled),
    ("gmask_token_id", BLANKS, OTHER_MASK, filled),
    ("smask_token_id", BLANKS, OTHER_MASK, filled),
    ("sop_token_id", BLANKS, OTHER_SOP, filled),
    ("tie_word_embeddings", {}, True, shapes),
    ("minillm_version", {}, "0.0.1", stamped),
    ("schema_version", {}, 1, stamped),
]


def test_every_field_is_flipped():
    """A new field needs a row above."""
    assert {flip[0] for flip in FLIPS} == set(MiniLLMConfig.__annotations__)


@pytest.mark.parametrize(
    ("field", "base", "value", "effect"), FLIPS, ids=[f"{flip[0]}-{flip[2]}-{flip[3].__name__}" for flip in FLIPS]
)
def test_a_flipped_field_shows(field, base, value, effect):
    before, after = tiny_config(**base), tiny_config(**{**base, field: value})
    if effect is not stamped:
        assert getattr(before, field) != getattr(after, field)
    assert effect(before, after)


@pytest.mark.parametrize(
    "effect", [shapes, outputs, far_outputs, initialisation, gradients, training_outputs, losses, recorded]
)
def test_the_detectors_see_nothing_where_nothing_changed(effect):
    fields = {"attention_dropout": 0.5} if effect is training_outputs else MOE if effect is losses else ALIBI
    assert not effect(tiny_config(**fields), tiny_config(**fields))


@pytest.mark.parametrize("effect", [generated, cached, started, filled])
def test_the_detectors_of_generation_see_nothing_where_nothing_changed(effect):
    fields = BLANKS if effect is filled else PREFIX
    assert not effect(tiny_config(**fields), tiny_config(**fields))


def test_the_gradient_scale_is_that_number():
    """The embedding's gradient alone is scaled, in training mode alone."""
    found = {}
    for scale in (1.0, 0.1):
        config = tiny_config(embedding_gradient_scale=scale)
        model = loud(config).train()
        model(**batch(config, "plain"), labels=batch(config, "plain")["input_ids"]).loss.backward()
        found[scale] = {name: parameter.grad for name, parameter in model.named_parameters()}
    for name, gradient in found[1.0].items():
        expected = gradient * (0.1 if name == "model.embed_tokens.weight" else 1.0)
        torch.testing.assert_close(found[0.1][name], expected)


# One setting of each kind, on which all fields are flipped.
CONTEXTS = {
    **{f"positions-{name}": {"position_embedding_type": name} for name in ("alibi", "sandwich", "learned", "none")},
    "positions-glm_2d-prefix": {"position_embedding_type": "glm_2d", **PREFIX},
    "positions-sinusoidal": {"position_embedding_type": "sinusoidal"},
    "rope_2d-prefix": {"rope_2d": True, **PREFIX},
    "dynamic": {"rope_parameters": {**LONG, "rope_type": "dynamic"}, "max_position_embeddings": 8},
    "yarn": {"rope_parameters": {**LONG, "rope_type": "yarn", "original_max_position_embeddings": 4}},
    "bidirectional": {"attention_type": "bidirectional"},
    "post": {"norm_placement": "post"},
    "deepnorm": DEEPNORM,
    "sandwich-layernorm": {"norm_placement": "sandwich", "norm_type": "layernorm"},
    "parallel": {"parallel_residual": True},
    "parallel-two-norms": {"parallel_residual": True, "num_parallel_norms": 2},
    "mlp": {"mlp_type": "mlp", "hidden_act": "gelu"},
    "moe": MOE,
    "stabilised": {"embedding_norm": True, "norm_head": True, "qk_norm": True},
    "tied-gqa-window": {"tie_word_embeddings": True, "num_key_value_heads": 2, "sliding_window": 4},
}
# What a field says nothing about, as its documentation has it.
SAYS_NOTHING = {
    # A limit only where positions come from a table or the rotation is stretched by it.
    "max_position_embeddings": lambda config: config.position_table_size is None,
    # Ids for generate(), which an encoder refuses.
    "eos_token_id": lambda config: config.attention_type == "bidirectional",
    "bos_token_id": lambda config: config.attention_type == "bidirectional",
    "pad_token_id": lambda config: config.attention_type == "bidirectional",
    "minillm_version": lambda config: True,
    "schema_version": lambda config: True,
}


def has_any_effect(before, after):
    if shapes(before, after):
        return True
    effects = [outputs, initialisation, gradients, training_outputs, cached, losses, recorded, without_logits]
    if before.position_embedding_type == "alibi":
        effects.append(far_outputs)
    if any(effect(before, after) for effect in effects):
        return True
    return before.attention_type != "bidirectional" and (generated(before, after) or started(before, after))


@pytest.mark.mostly_thorough(
    "positions-alibi",
    "rope_2d-prefix",
    "yarn",
    "bidirectional",
    "deepnorm",
    "parallel-two-norms",
    "moe",
    "tied-gqa-window",
)
@pytest.mark.parametrize("context", CONTEXTS)
def test_a_field_shows_or_is_refused_whatever_the_others_are(context):
    fields = CONTEXTS[context]
    for field, _, value, _ in FLIPS:
        before = tiny_config(**fields)
        if getattr(before, field) == value or (field in SAYS_NOTHING and SAYS_NOTHING[field](before)):
            continue
        try:
            after = tiny_config(**{**fields, field: value})
        except ValueError:
            continue
        if field in ("eos_token_id", "pad_token_id"):
            assert getattr(fresh(after).generation_config, field) == value
            continue
        assert has_any_effect(before, after), f"{field}={value} changes nothing with {fields}"


def test_vocabulary_size_is_the_number_of_logits():
    assert loud(tiny_config())(**batch(tiny_config(), "plain")).logits.shape[-1] == VOCAB
