"""Config keys that are not our fields: other libraries' spellings of them, and transformers' own extras.

What somebody types (keywords of the constructor, overrides) is refused where it is probably a field misspelt. A saved
config is no place for that: it may hold whatever was assigned before, and a file that was written must load.
"""

import difflib
from collections.abc import Collection
from types import SimpleNamespace
from typing import Any

from transformers.utils import logging

logger = logging.get_logger(__name__)

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

NO_DECODER_FIELDS = (
    "is_encoder_decoder add_cross_attention cross_attention_hidden_size tie_encoder_decoder pruned_heads "
    "chunk_size_feed_forward"
).split()
"""transformers' own fields for models of other kinds, which no part of this one reads."""

ONLY_READ_ELSEWHERE = {
    "layer_types": "sliding_window",
    "attention_chunk_size": "sliding_window",
    "num_kv_shared_layers": "num_key_value_heads",
    "kv_sharing_modes": "num_key_value_heads",
    "original_max_position_embeddings": "rope_parameters['original_max_position_embeddings']",
}
"""Keys that transformers' caches and RoPE would read and this model would not, and what says the same here."""


def meant_by(keywords: dict[str, Any], names: Collection[str]) -> dict[str, str | None]:
    """The keywords that are neither among `names` nor known to transformers, and which of `names` each is probably
    meant to be."""
    unknown = [key for key in keywords if not (key in names or key in KNOWN_EXTRA_KEYS or key.startswith("_"))]
    return {
        key: FOREIGN_SPELLINGS.get(key) or next(iter(difflib.get_close_matches(key, names, 1, 0.8)), None)
        for key in unknown
    }


def refuse_misspelt(keywords: dict[str, Any], names: Collection[str]) -> None:
    """Raises ValueError for a keyword that somebody typed and probably meant to be one of `names`."""
    for key, meant in meant_by(keywords, names).items():
        if meant is not None:
            raise ValueError(f"`{key}={keywords[key]!r}` is not a field of MiniLLMConfig; did you mean `{meant}`?")


def warn_of_unknown(keywords: dict[str, Any], names: Collection[str]) -> None:
    """Warns once of keys that are kept and not read."""
    found = meant_by(keywords, names)
    for key, meant in found.items():
        if meant is not None:
            logger.warning_once(
                f"MiniLLMConfig keeps `{key}={keywords[key]!r}` of a saved config as it is, but no part of the model "
                f"reads it; did you mean `{meant}`?"
            )
    others = sorted(key for key, meant in found.items() if meant is None)
    if others:
        logger.warning_once(
            f"MiniLLMConfig keeps the unknown keys {others} as they are: no part of the model reads them."
        )


def foreign_conflicts(config: SimpleNamespace) -> list[tuple[bool, str]]:
    """Pairs of (is it so, what is wrong and the way out), for attributes that speak of a model of another kind."""
    attributes = vars(config)
    is_causal = attributes.get("is_causal")
    return [
        *(
            (
                bool(attributes.get(name)),
                f"`{name}={attributes.get(name)!r}` has no meaning in a decoder-only model: leave it out",
            )
            for name in NO_DECODER_FIELDS
        ),
        *(
            (
                attributes.get(name) is not None,
                f"`{name}={attributes.get(name)!r}` would be read by parts of transformers and not by the model: "
                f"leave it out and set `{meant}`",
            )
            for name, meant in ONLY_READ_ELSEWHERE.items()
        ),
        (
            "configuration_files" in attributes,
            f"`configuration_files={attributes.get('configuration_files')!r}` would send transformers to another file "
            "than the saved config: leave it out",
        ),
        (
            is_causal is not None and is_causal != (config.attention_type != "bidirectional"),
            f"`is_causal={is_causal!r}` and `attention_type={config.attention_type!r}`: transformers' masks would "
            "follow the one, the model follows the other; leave `is_causal` out and set `attention_type`",
        ),
    ]
