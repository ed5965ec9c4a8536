"""Writes GGUF files of tiny LLaMAs, as llama.cpp would."""

import json

import gguf
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

SPECIAL = ["<pad>", "<s>", "</s>"]


TEMPLATE = "{% for message in messages %}<s>{{ message['content'] }}</s>{% endfor %}"


TEXT = "the quick brown fox jumps over the lazy dog, and the lazy dog jumps over the quick brown fox"


def byte_level_tokenizer(size):
    """A byte-level BPE of `size` tokens, for the characters of `TEXT` only."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.train_from_iterator([TEXT], trainers.BpeTrainer(vocab_size=size, special_tokens=SPECIAL))
    assert backend.get_vocab_size() == size
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


def in_order_of_gguf(weight, heads):
    """Queries and keys with the two halves of each head interleaved, as llama.cpp's RoPE wants them."""
    return weight.reshape(heads, 2, -1, weight.shape[-1]).swapaxes(1, 2).reshape(weight.shape)


def settings_of(config):
    return {
        "block_count": config.num_hidden_layers,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "attention.key_length": config.head_dim,
        "attention.value_length": config.head_dim,
        "rope.freq_base": config.rope_parameters["rope_theta"],
        "rope.dimension_count": config.head_dim,
        "rope.scaling.type": "none",
        "vocab_size": config.vocab_size,
    }


def add_tokenizer(writer, tokenizer, add_bos):
    tokens = sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().get)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token.startswith("<") else 1 for token in tokens])
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    writer.add_token_merges([" ".join(pair) for pair in merges])
    writer.add_bos_token_id(tokenizer.bos_token_id)
    writer.add_eos_token_id(tokenizer.eos_token_id)
    writer.add_pad_token_id(tokenizer.pad_token_id)
    writer.add_unk_token_id(tokenizer.pad_token_id)
    writer.add_add_bos_token(add_bos)
    writer.add_chat_template(TEMPLATE)


def write_gguf(
    file, native, quantization=None, architecture="llama", leave_out=(), tensors=None, add_bos=False, **changes
):
    """Writes a native LLaMA; a setting of None is left out."""
    writer = gguf.GGUFWriter(file, architecture)
    settings = {f"{architecture}.{key}": value for key, value in settings_of(native.config).items()}
    kinds = {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
    for key, value in (settings | changes).items():
        if value is not None:
            kinds[type(value)](key, value)
    add_tokenizer(writer, byte_level_tokenizer(native.config.vocab_size), add_bos)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, native.config.num_hidden_layers)
    heads = {"q_proj": native.config.num_attention_heads, "k_proj": native.config.num_key_value_heads}
    for name, tensor in native.state_dict().items():
        if (name == "lm_head.weight" and native.config.tie_word_embeddings) or name in leave_out:
            continue
        module = name.split(".")[-2]
        array = in_order_of_gguf(tensor, heads[module]) if module in heads else tensor
        data = array.contiguous().numpy()
        kind = quantization if data.ndim == 2 else None
        if kind is not None:
            data = gguf.quantize(data, kind)
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight",)), data, raw_dtype=kind)
    for name, tensor in (tensors or {}).items():
        writer.add_tensor(name, tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file
