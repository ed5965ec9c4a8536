"""The contenders: MiniLLM's variants and transformers' own models, all of one shape."""

import gc
from collections.abc import Iterator
from itertools import cycle
from typing import Any, NamedTuple

import torch
import torch._dynamo
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    FalconConfig,
    Gemma3TextConfig,
    GlmConfig,
    LlamaConfig,
    MixtralConfig,
    MptConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen3Config,
)
from transformers.modeling_layers import GradientCheckpointingLayer

from minillm import MiniLLMConfig

COMPILE_BACKEND = "inductor"

DTYPES = {"cpu": torch.float32, "cuda": torch.bfloat16}

EXPERTS = {"num_local_experts": 8, "num_experts_per_tok": 2}

VARIANTS: dict[str, dict[str, Any]] = {
    "MiniLLM causal": {},
    "MiniLLM prefix": {"attention_type": "prefix"},
    "MiniLLM alibi": {"position_embedding_type": "alibi"},
    "MiniLLM moe": {"mlp_type": "moe", **EXPERTS},
}


class Shape(NamedTuple):
    """What all contenders have in common; `length` is the one that they are made for."""

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    length: int
    tie_word_embeddings: bool = True


class Contender(NamedTuple):
    """A model and how it runs.

    Args:
        model: a name of `VARIANTS`, or a rival's.
        attention: attention back end; None: the model's own choice.
        compiled: whether each block is compiled (the blocks are alike, so that one compilation serves them all).
    """

    model: str
    attention: str | None = None
    compiled: bool = False

    @property
    def name(self) -> str:
        backend = {None: "", "flex_attention": ", flex"}.get(self.attention, f", {self.attention}")
        return f"{self.model}{backend}{', compiled' if self.compiled else ''}"


def inner_size(hidden_size: int) -> int:
    """MiniLLM's default: 8/3 of the width, in steps of 256."""
    return -(-8 * hidden_size // (3 * 256)) * 256


def config_of(model: str, shape: Shape) -> PreTrainedConfig:
    """The configuration of a model in a shape.

    Gated feed-forwards have the inner width of MiniLLM's default, plain ones four times the hidden one, as their
    families do; experts a quarter of the former, which makes half of its arithmetic with two experts a token.
    """
    hidden, heads = shape.hidden_size, shape.num_attention_heads
    tokens = {"bos_token_id": 1, "eos_token_id": 2}
    common = {
        "vocab_size": shape.vocab_size,
        "hidden_size": hidden,
        "num_hidden_layers": shape.num_hidden_layers,
        "num_attention_heads": heads,
        "tie_word_embeddings": shape.tie_word_embeddings,
        **tokens,
    }
    gated = {**common, "intermediate_size": inner_size(hidden), "max_position_embeddings": shape.length}
    experts = {**gated, "intermediate_size": inner_size(hidden) // 4, "num_key_value_heads": heads}
    if model in VARIANTS:
        fields = experts if model == "MiniLLM moe" else gated
        return MiniLLMConfig(**fields, **VARIANTS[model])
    if model == "Llama":
        return LlamaConfig(**gated)
    if model == "Qwen3":
        return Qwen3Config(**gated, num_key_value_heads=heads, head_dim=hidden // heads)
    if model == "Gemma3":
        # Five layers of six have a window, as in the published models.
        sizes = {"num_key_value_heads": heads, "head_dim": hidden // heads, "query_pre_attn_scalar": hidden // heads}
        return Gemma3TextConfig(**gated, **sizes, sliding_window=512)
    if model == "GLM":
        return GlmConfig(**gated, num_key_value_heads=heads, head_dim=hidden // heads, pad_token_id=None)
    if model == "Mixtral":
        return MixtralConfig(**experts, **EXPERTS)
    if model == "Bloom":
        return BloomConfig(**common)
    if model == "Falcon":
        # With ALiBi and without shared heads, as in the models on RefinedWeb.
        return FalconConfig(**common, alibi=True, multi_query=False, parallel_attn=False, bias=True)
    if model == "MPT":
        sizes = {"d_model": hidden, "n_heads": heads, "n_layers": shape.num_hidden_layers, "max_seq_len": shape.length}
        tied = {"vocab_size": shape.vocab_size, "tie_word_embeddings": shape.tie_word_embeddings}
        # Its own default is to decode without a cache.
        return MptConfig(**sizes, **tied, **tokens, use_cache=True)
    raise ValueError(f"no model is called {model!r}")


def build(contender: Contender, shape: Shape, device: str, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """The model with random weights, on its device; without a `dtype` in bfloat16 on CUDA and in float32 on CPU."""
    torch.manual_seed(0)
    chosen = {} if contender.attention is None else {"attn_implementation": contender.attention}
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(
            config_of(contender.model, shape), dtype=dtype or DTYPES[device], **chosen
        )
    if contender.compiled:
        # Of too many shapes the compiler would let all further ones run uncompiled, without a word.
        torch._dynamo.config.fail_on_recompile_limit_hit = True
        for module in model.modules():
            if isinstance(module, GradientCheckpointingLayer):
                module.compile(backend=COMPILE_BACKEND, dynamic=False)
    return model.to(device)


def start_afresh() -> None:
    """For the next contenders: frees what the last ones left, memory and compiled shapes, which have a limit that all
    blocks of all models share."""
    torch._dynamo.reset()
    torch._dynamo.config.fail_on_recompile_limit_hit = False
    gc.collect()
    torch.cuda.empty_cache()


def rotating_ids(shape: Shape, batch: int, length: int, device: str, buffers: int = 4) -> Iterator[torch.Tensor]:
    """Random ids [batch, length], a few tensors in turn: no step finds the last one's input in a cache."""
    generator = torch.Generator().manual_seed(0)
    size = (buffers, batch, length)
    return cycle(torch.randint(3, shape.vocab_size, size, generator=generator).to(device).unbind())


def extra_inputs(model: str, ids: torch.Tensor) -> dict[str, Any]:
    """What a model trains with beside ids: a prefix of half the length, or the loss that balances experts."""
    if model == "MiniLLM prefix":
        prefix = torch.zeros_like(ids)
        prefix[:, : ids.shape[1] // 2] = 1
        return {"prefix_mask": prefix}
    return {"output_router_logits": True} if model in ("MiniLLM moe", "Mixtral") else {}
