"""Experts, and Mixtral with the same weights."""

from transformers import MixtralConfig, MixtralForCausalLM

SHARED = (
    "vocab_size hidden_size num_hidden_layers num_attention_heads num_key_value_heads intermediate_size "
    "max_position_embeddings num_local_experts num_experts_per_tok router_aux_loss_coef router_jitter_noise "
    "output_router_logits sliding_window pad_token_id eos_token_id rope_parameters"
).split()


def mixtral_twin(model):
    """Mixtral with the weights of a MiniLLM under the same names."""
    fields = {name: getattr(model.config, name) for name in SHARED}
    twin = MixtralForCausalLM(MixtralConfig(rms_norm_eps=model.config.norm_eps, **fields)).eval()
    twin.load_state_dict(model.state_dict(), strict=True)
    return twin
