"""Config keys that are not our fields: other libraries' spellings of them, and transformers' own extras."""

FOREIGN_SPELLINGS = {
    "n_embd": "hidden_size",
    "d_model": "hidden_size",
    "n_embed": "hidden_size",
    "n_layer": "num_hidden_layers",
    "n_layers": "num_hidden_layers",
    "num_layers": "num_hidden_layers",
    "n_head": "num_attention_heads",
    "n_heads": "num_attention_heads",
    "num_heads": "num_attention_heads",
    "num_kv_heads": "num_key_value_heads",
    "multi_query_group_num": "num_key_value_heads",
    "multi_query": "num_key_value_heads",
    "kv_channels": "head_dim",
    "n_inner": "intermediate_size",
    "ffn_dim": "intermediate_size",
    "ffn_hidden_size": "intermediate_size",
    "inner_hidden_size": "intermediate_size",
    "moe_intermediate_size": "intermediate_size",
    "num_experts": "num_local_experts",
    "n_routed_experts": "num_local_experts",
    "moe_num_experts": "num_local_experts",
    "moe_top_k": "num_experts_per_tok",
    "num_experts_per_token": "num_experts_per_tok",
    "router_aux_loss_weight": "router_aux_loss_coef",
    "n_positions": "max_position_embeddings",
    "n_ctx": "max_position_embeddings",
    "max_seq_len": "max_position_embeddings",
    "max_sequence_length": "max_position_embeddings",
    "seq_length": "max_position_embeddings",
    "model_max_length": "max_position_embeddings",
    "rms_norm_eps": "norm_eps",
    "layer_norm_eps": "norm_eps",
    "layer_norm_epsilon": "norm_eps",
    "layernorm_epsilon": "norm_eps",
    "activation_function": "hidden_act",
    "hidden_activation": "hidden_act",
    "alibi": "position_embedding_type",
    "attention_bias": "attention_qkv_bias",
    "add_qkv_bias": "attention_qkv_bias",
    "parallel_attn": "parallel_residual",
    "num_ln_in_parallel_attn": "num_parallel_norms",
    "attn_pdrop": "attention_dropout",
    "resid_pdrop": "hidden_dropout",
    "embd_pdrop": "embedding_dropout",
    "padded_vocab_size": "vocab_size",
    "block_position_encoding": "position_embedding_type",
    "is_causal": "attention_type",
    # transformers' caches would read the first three, the model would not.
    "layer_types": "sliding_window",
    "attention_chunk_size": "sliding_window",
    "num_kv_shared_layers": "num_key_value_heads",
    "use_sliding_window": "sliding_window",
    "window_size": "sliding_window",
    "rope_base": "rope_parameters",
    "rope_freq_base": "rope_parameters",
    "rope_ratio": "rope_parameters",
    "rotary_emb_base": "rope_parameters",
    "rotary_base": "rope_parameters",
    "rotary_pct": "rope_parameters",
    "rotary_dim": "rope_parameters",
}
"""Other libraries' names for our fields: converters know them, a MiniLLM config refuses them by name."""

KNOWN_EXTRA_KEYS = frozenset(
    "model_type auto_map num_labels output_attentions attn_implementation experts_implementation name_or_path "
    "torch_dtype quantization_config rope_theta rope_scaling partial_rotary_factor per_layer_config "
    "tie_last_hidden_states is_decoder gradient_checkpointing classifier_dropout tokenizer_class custom_pipelines "
    "label_names token_classification_bias add_cross_attention cross_attention_hidden_size "
    "max_length min_length do_sample early_stopping num_beams temperature top_k top_p typical_p "
    "repetition_penalty length_penalty no_repeat_ngram_size encoder_no_repeat_ngram_size bad_words_ids "
    "num_return_sequences output_scores return_dict_in_generate forced_bos_token_id forced_eos_token_id "
    "remove_invalid_values exponential_decay_length_penalty suppress_tokens begin_suppress_tokens num_beam_groups "
    "diversity_penalty decoder_start_token_id sep_token_id prefix task_specific_params finetuning_task "
    "tie_encoder_decoder pruned_heads".split()
)
"""Keys that transformers itself reads or writes beside our fields."""
