"""Families that transformers does not ship, as equations: plain torch, one text at a time, in their own key names.

Written from the papers and the public code, without a line of MiniLLM. The cases in `tests/families` hold them to what
that code computed; for Baichuan2-7B and GLM-130B, of which nothing is recorded, they stand alone.
"""

import json
import math
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch.nn.functional import cross_entropy, gelu, layer_norm, linear, normalize, silu

FOLDER = Path(__file__).parents[1] / "families"
FAMILY_OF = {
    "baichuan-7b": "baichuan",
    "baichuan-13b": "baichuan",
    "baichuan2-7b": "baichuan2",
    "baichuan2-13b": "baichuan2",
    "chatglm-6b": "chatglm",
    "chatglm2-6b": "chatglm2",
    "glm-10b": "glm-infilling",
    "glm-130b": "glm-130b",
}
RECORDED = tuple(name for name in FAMILY_OF if (FOLDER / name).is_dir())
SECOND_AXIS = ("chatglm-6b", "glm-10b")
LOOKS_BOTH_WAYS = (*SECOND_AXIS, "glm-130b")


class Text(NamedTuple):
    """Token ids, how many of them see one another in both directions, and their places on both axes.

    Without places a token's is its index. `counts` says whether what fills a blank counts on the first axis too.
    """

    ids: list[int]
    prefix: int = 0
    first: list[int] | None = None
    second: list[int] | None = None
    counts: bool = False

    def then(self, token):
        if self.first is None:
            return self._replace(ids=[*self.ids, token])
        first, second = [*self.first, self.first[-1] + self.counts], [*self.second, self.second[-1] + 1]
        return self._replace(ids=[*self.ids, token], first=first, second=second)


def blank_text(ids, blank, start, counts=False):
    """A context with a blank token, then a start token and what fills the blank: all of it stands at the blank."""
    at, place = ids.index(start), ids.index(blank)
    behind = len(ids) - at
    first = list(range(len(ids))) if counts else [*range(at), *[place] * behind]
    return Text(ids, at, first, [0] * at + list(range(1, behind + 1)), counts)


# --- checkpoints ---


def draw_folder(name, folder):
    """A tiny checkpoint of a family of which none is recorded, with random weights, biases and norms."""
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: 0.3 * torch.randn(*shape, generator=generator)  # noqa: E731
    if name == "baichuan2-7b":
        config = json.loads((FOLDER / "baichuan-7b" / "config.json").read_text("utf-8"))
        config["z_loss_weight"] = 0
        weights = load_file(FOLDER / "baichuan-7b" / "model.safetensors")
        weights["lm_head.weight"] = weights["lm_head.weight"] * (1 + 3 * torch.rand(128, 1, generator=generator))
    else:
        config = {"model_type": "glm-130b", "num_layers": 3, "hidden_size": 24, "inner_hidden_size": 40}
        config |= {"vocab_size": 128, "num_attention_heads": 3, "max_sequence_length": 64, "layernorm_epsilon": 1e-5}
        shapes = {"attention.query_key_value": (72, 24), "attention.dense": (24, 24)}
        shapes |= {"mlp.dense_h_to_4h": (80, 24), "mlp.dense_4h_to_h": (24, 40)}
        weights = {"transformer.word_embeddings.weight": draw(128, 24)}
        norms = ["final_layernorm"]
        for block in (f"layers.{i}." for i in range(3)):
            norms += [f"{block}input_layernorm", f"{block}post_attention_layernorm"]
            for part, (rows, columns) in shapes.items():
                weights[f"transformer.{block}{part}.weight"] = draw(rows, columns)
                weights[f"transformer.{block}{part}.bias"] = draw(rows)
        for norm in norms:
            weights |= {f"transformer.{norm}.weight": 1 + draw(24), f"transformer.{norm}.bias": draw(24)}
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config), "utf-8")
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


class Equations:
    """`logits(text)` [tokens, vocabulary] of the checkpoint in a folder, in float64, and what they depend on."""

    def __init__(self, name, folder):
        self.config = json.loads((folder / "config.json").read_text("utf-8"))
        tensors = {key: value.double() for key, value in load_file(folder / "model.safetensors").items()}
        if FAMILY_OF[name] == "baichuan2":
            # As the reference leaves them after its first evaluation.
            tensors["lm_head.weight"] = normalize(tensors["lm_head.weight"])
        self.weights = {key: value.requires_grad_() for key, value in tensors.items()}
        self.forward = FORWARD[name]

    def logits(self, text):
        return self.forward(self, text)

    def loss(self, texts):
        """Mean over all tokens but the first, or over those behind the start of what fills a blank."""
        losses = []
        for text in texts:
            begin = max(text.prefix, 1 if text.first is None else text.prefix + 1)
            predicted = self.logits(text)[begin - 1 : -1]
            losses.append(cross_entropy(predicted, torch.tensor(text.ids[begin:]), reduction="none"))
        return torch.cat(losses).mean()

    def continued(self, text, steps):
        """Greedy tokens and the logits [steps, vocabulary] that each was taken from."""
        logits = []
        with torch.no_grad():
            for _ in range(steps):
                logits.append(self.logits(text)[-1])
                text = text.then(int(logits[-1].argmax()))
        return text.ids[-steps:], torch.stack(logits)

    def linear(self, x, name):
        return linear(x, self.weights[f"{name}.weight"], self.weights.get(f"{name}.bias"))

    def layer_norm(self, x, name):
        return layer_norm(x, x.shape[-1:], self.weights[f"{name}.weight"], self.weights[f"{name}.bias"], 1e-5)

    def rms_norm(self, x, name, eps):
        return x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt() * self.weights[f"{name}.weight"]


# --- parts ---


def heads_of(x, count):
    """[tokens, heads * size] to [heads, tokens, size]."""
    return x.unflatten(-1, (count, -1)).transpose(0, 1)


def attend(q, k, v, prefix=0, slopes=None):
    """Each query sees the keys up to its own, and all of the prefix; [tokens, heads * size]."""
    at = torch.arange(q.shape[1])
    seen = (at <= at[:, None]) | ((at < prefix) & (at[:, None] < prefix))
    scores = q @ k.transpose(1, 2) / math.sqrt(q.shape[-1])
    if slopes is not None:
        scores = scores - torch.tensor(slopes).double()[:, None, None] * (at[:, None] - at).abs()
    return (scores.masked_fill(~seen, -math.inf).softmax(-1) @ v).transpose(0, 1).flatten(1)


def turn(x, places, neighbours=False):
    """RoPE: the pairs are a channel and that half the width behind it, or neighbours."""
    width = x.shape[-1]
    angles = torch.tensor(places).double()[:, None] * 10000.0 ** (-torch.arange(0, width, 2).double() / width)
    pairs = x.unflatten(-1, (-1, 2)).unbind(-1) if neighbours else x.chunk(2, dim=-1)
    a, b = pairs
    turned = a * angles.cos() - b * angles.sin(), b * angles.cos() + a * angles.sin()
    return torch.stack(turned, dim=-1).flatten(-2) if neighbours else torch.cat(turned, dim=-1)


def alibi_slopes(heads):
    below = 2 ** int(math.log2(heads))
    geometric = [2 ** (-8 / below * (i + 1)) for i in range(below)]
    return geometric + [2 ** (-4 / below * (i + 1)) for i in range(0, 2 * (heads - below), 2)]


def gelu_tanh(x):
    return gelu(x, approximate="tanh")


# --- families ---


def baichuan(self, text, alibi=False, normalised_head=False):
    heads, eps = self.config["num_attention_heads"], self.config["rms_norm_eps"]
    slopes, places = alibi_slopes(heads) if alibi else None, range(len(text.ids))
    h = self.weights["model.embed_tokens.weight"][text.ids]
    for block in (f"model.layers.{i}." for i in range(self.config["num_hidden_layers"])):
        x = self.rms_norm(h, f"{block}input_layernorm", eps)
        q, k, v = (heads_of(part, heads) for part in self.linear(x, f"{block}self_attn.W_pack").chunk(3, dim=-1))
        if not alibi:
            q, k = turn(q, places), turn(k, places)
        h = h + self.linear(attend(q, k, v, slopes=slopes), f"{block}self_attn.o_proj")
        x = self.rms_norm(h, f"{block}post_attention_layernorm", eps)
        gated = silu(self.linear(x, f"{block}mlp.gate_proj")) * self.linear(x, f"{block}mlp.up_proj")
        h = h + self.linear(gated, f"{block}mlp.down_proj")
    head = self.weights["lm_head.weight"]
    return linear(self.rms_norm(h, "model.norm", eps), normalize(head) if normalised_head else head)


def chatglm2(self, text):
    heads, groups = self.config["num_attention_heads"], self.config["multi_query_group_num"]
    size, eps, places = self.config["kv_channels"], self.config["layernorm_epsilon"], range(len(text.ids))
    h = self.weights["transformer.embedding.word_embeddings.weight"][text.ids]
    for block in (f"transformer.encoder.layers.{i}." for i in range(self.config["num_layers"])):
        x = self.linear(self.rms_norm(h, f"{block}input_layernorm", eps), f"{block}self_attention.query_key_value")
        q, k, v = x.split([heads * size, groups * size, groups * size], dim=-1)
        q, k, v = heads_of(q, heads), heads_of(k, groups), heads_of(v, groups)
        q, k = (torch.cat((turn(x[..., : size // 2], places, True), x[..., size // 2 :]), dim=-1) for x in (q, k))
        k, v = (x.repeat_interleave(heads // groups, dim=0) for x in (k, v))
        h = h + self.linear(attend(q, k, v), f"{block}self_attention.dense")
        x = self.linear(self.rms_norm(h, f"{block}post_attention_layernorm", eps), f"{block}mlp.dense_h_to_4h")
        gate, up = x.chunk(2, dim=-1)
        h = h + self.linear(silu(gate) * up, f"{block}mlp.dense_4h_to_h")
    return self.linear(self.rms_norm(h, "transformer.encoder.final_layernorm", eps), "transformer.output_layer")


def glm(self, text):
    heads, table = self.config["num_attention_heads"], "glm.word_embeddings.weight"
    h = self.weights[table][text.ids] + self.weights["glm.transformer.position_embeddings.weight"][text.first]
    h = h + self.weights["glm.transformer.block_position_embeddings.weight"][text.second]
    for block in (f"glm.transformer.layers.{i}." for i in range(self.config["num_layers"])):
        x = self.linear(self.layer_norm(h, f"{block}input_layernorm"), f"{block}attention.query_key_value")
        q, k, v = (heads_of(part, heads) for part in x.chunk(3, dim=-1))
        h = h + self.linear(attend(q, k, v, text.prefix), f"{block}attention.dense")
        x = self.linear(self.layer_norm(h, f"{block}post_attention_layernorm"), f"{block}mlp.dense_h_to_4h")
        h = h + self.linear(gelu(x), f"{block}mlp.dense_4h_to_h")
    return linear(self.layer_norm(h, "glm.transformer.final_layernorm"), self.weights[table])


def normalised_stream(self, text, h, rotate, feed_forward):
    """ChatGLM-6B's and GLM-130B's blocks, whose residual branch carries the normalised input, times alpha."""
    heads, alpha = self.config["num_attention_heads"], math.sqrt(2 * self.config["num_layers"])
    for block in (f"transformer.layers.{i}." for i in range(self.config["num_layers"])):
        x = self.layer_norm(h, f"{block}input_layernorm")
        by_head = heads_of(self.linear(x, f"{block}attention.query_key_value"), heads)
        q, k, v = by_head.chunk(3, dim=-1)
        attended = attend(rotate(q), rotate(k), v, text.prefix)
        h = alpha * x + self.linear(attended, f"{block}attention.dense")
        y = self.layer_norm(h, f"{block}post_attention_layernorm")
        inner = feed_forward(self.linear(y, f"{block}mlp.dense_h_to_4h"))
        h = alpha * y + self.linear(inner, f"{block}mlp.dense_4h_to_h")
    return self.layer_norm(h, "transformer.final_layernorm")


def chatglm(self, text):
    def rotate(x):
        first, second = x.chunk(2, dim=-1)
        return torch.cat((turn(first, text.first), turn(second, text.second)), dim=-1)

    h = self.weights["transformer.word_embeddings.weight"][text.ids]
    return self.linear(normalised_stream(self, text, h, rotate, gelu_tanh), "lm_head")


def glm_130b(self, text):
    """arXiv 2210.02414, section 2.2; one axis, on which a text after [gMASK] counts on."""
    table = self.weights["transformer.word_embeddings.weight"]
    embedded = table[text.ids]
    h = 0.1 * embedded + 0.9 * embedded.detach()

    def feed_forward(x):
        up, gate = x.chunk(2, dim=-1)
        return up * gelu(gate)

    places = text.first or range(len(text.ids))
    return linear(normalised_stream(self, text, h, lambda x: turn(x, places), feed_forward), table)


FORWARD = {
    "baichuan-7b": baichuan,
    "baichuan-13b": lambda self, text: baichuan(self, text, alibi=True),
    "baichuan2-7b": lambda self, text: baichuan(self, text, normalised_head=True),
    "baichuan2-13b": lambda self, text: baichuan(self, text, alibi=True, normalised_head=True),
    "chatglm-6b": chatglm,
    "chatglm2-6b": chatglm2,
    "glm-10b": glm,
    "glm-130b": glm_130b,
}
