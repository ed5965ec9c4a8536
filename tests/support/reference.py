"""The naive twin of MiniLLM: every mask, bias, position scheme, norm and wiring in its slowest and plainest form.

Masks and biases are plain Python functions of one query slot and one key slot, attention is a loop over batch rows,
heads and queries that only ever touches the keys a query may see, and nothing is cached, padded with minus infinity
or computed twice in two ways. All operations are differentiable, so gradients can be held against the model's too.
The dtype of the weights decides the arithmetic: double for a yardstick, float32 to see what rounding alone does.
"""

import math
from dataclasses import dataclass, replace

import torch
from transformers import LlamaConfig
from transformers.activations import ACT2FN
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS


@dataclass
class Row:
    """What is known of one batch row, slot by slot: plain Python lists, one entry a token."""

    real: list  # bool: False where attention_mask is 0
    document: list  # the document's number, None at padding
    position: list  # index of the token in its document (or what the caller says)
    block_position: list  # GLM's second axis
    prefix_block: list  # number of the bidirectional block the token belongs to, or None
    own_mask: list | None = None  # what a caller's own mask adds to a score: [head][query][key], -inf where it hides

    def __len__(self):
        return len(self.real)


def as_lists(tensor, batch, length, default):
    if tensor is None:
        return [[default] * length for _ in range(batch)]
    return tensor.expand(batch, length).tolist()


def describe_rows(
    shape, attention_mask=None, position_ids=None, prefix_mask=None, document_ids=None, block_position_ids=None
):
    """One `Row` for each batch row. A document begins where `document_ids` says so; without it, and without
    `attention_mask` and `block_position_ids`, at every slot after the first whose given position is 0; otherwise a
    row is one document.
    """
    batch, length = shape
    packed_by_positions = position_ids is not None and all(
        given is None for given in (attention_mask, document_ids, block_position_ids)
    )
    masks = as_lists(attention_mask, batch, length, 1)
    documents = as_lists(document_ids, batch, length, 0)
    positions = as_lists(position_ids, batch, length, None)
    prefixes = as_lists(prefix_mask, batch, length, 0)
    blocks = as_lists(block_position_ids, batch, length, 0)
    rows = []
    for index in range(batch):
        if packed_by_positions:
            documents[index] = restarts(positions[index])
        real = [bool(value) for value in masks[index]]
        document = [number if is_real else None for number, is_real in zip(documents[index], real, strict=True)]
        position = positions[index] if position_ids is not None else count_positions(document)
        prefix_block = number_prefix_blocks(document, prefixes[index])
        rows.append(Row(real, document, position, blocks[index], prefix_block))
    return rows


def restarts(positions):
    """Document numbers from positions that start again at 0."""
    number, numbers = 0, []
    for slot, position in enumerate(positions):
        number += slot > 0 and position == 0
        numbers.append(number)
    return numbers


def count_positions(document):
    """How many real tokens of the same document come before each slot (0 at padding, where it is never read)."""
    return [
        0 if number is None else sum(other == number for other in document[:slot])
        for slot, number in enumerate(document)
    ]


def number_prefix_blocks(document, prefix):
    """A block begins at the first prefix token of a run, at a change of document and where the mask's number changes
    (prompts of later turns are 2, 3, ...); padding neither begins nor ends one.
    """
    block, blocks, last = -1, [], None
    for number, inside in zip(document, prefix, strict=True):
        if number is None:
            blocks.append(None)
            continue
        now = (number, inside)
        if inside and now != last:
            block += 1
        blocks.append(block if inside else None)
        last = now
    return blocks


def visible(attention_type, sliding_window, row, query, key):
    """Whether the token in slot `query` attends to the token in slot `key`. Windows count slots, among which there is
    no padding: the model refuses it.
    """
    if not row.real[key]:
        return False
    same_document = row.document[query] == row.document[key]
    if attention_type == "bidirectional":
        near = sliding_window is None or abs(query - key) < sliding_window
        return same_document and near
    near = sliding_window is None or query - key < sliding_window
    if key <= query and same_document and near:
        return True
    same_block = row.prefix_block[query] is not None and row.prefix_block[query] == row.prefix_block[key]
    return attention_type == "prefix" and same_block


def sees(config, row, added, query, key):
    """A caller's own mask says all by itself who sees whom."""
    if row.own_mask is not None:
        return added[key] > -math.inf
    return visible(config.attention_type, config.sliding_window, row, query, key)


def alibi_slopes(num_heads, bias_max=8.0):
    """ALiBi (arXiv 2108.12409, section 3): 2^(-bias_max/n), its powers; for other n than powers of two, those of the
    power of two below, then every second one of the power of two above.
    """
    below = 2 ** math.floor(math.log2(num_heads))
    slopes = [2.0 ** (-bias_max / below * i) for i in range(1, below + 1)]
    above = [2.0 ** (-bias_max / (2 * below) * i) for i in range(1, 2 * below + 1)]
    return (slopes + above[0::2])[:num_heads]


def alibi_bias(config, head, query_position, key_position, model_dtype=torch.float32):
    """`head` counts from 0. The rounded forms depend on the key alone: what they lack is constant along a row of
    scores.
    """
    slope = alibi_slopes(config.num_attention_heads, config.alibi_bias_max)[head]
    if config.alibi_rounding == "bloom":
        product = torch.tensor(slope, dtype=torch.float32) * key_position
        return config.alibi_scale * product.to(model_dtype).item()
    if config.alibi_rounding == "falcon":
        product = torch.tensor(slope).bfloat16() * torch.tensor(key_position).bfloat16()
        return config.alibi_scale * product.to(model_dtype).item()
    return config.alibi_scale * -slope * abs(query_position - key_position)


def sandwich_bias(config, head, query_position, key_position):
    """Sandwich (arXiv 2212.10356, section 4): the sum of cosines of a sinusoidal embedding's inner product,
    compressed by a ratio that grows with the head. `head` counts from 0, the paper's from 1.
    """
    distance = query_position - key_position
    dim = config.sandwich_dim
    total = sum(math.cos(distance / 10000 ** (2 * i / dim)) for i in range(dim // 2))
    return total / (8 * (head + 1) / config.num_attention_heads)


def bias(config, head, query_position, key_position, model_dtype):
    if config.position_embedding_type == "alibi":
        return alibi_bias(config, head, query_position, key_position, model_dtype)
    if config.position_embedding_type == "sandwich":
        return sandwich_bias(config, head, query_position, key_position)
    return 0.0


def rope_frequencies(parameters, dim, max_position_embeddings, length):
    """Inverse frequencies (a list of dim / 2) and the factor on cosines and sines, for `dim` rotated channels.
    `length` is that of the token's document: two types stretch with it.
    """
    theta, rope_type = parameters.get("rope_theta", 10000.0), parameters.get("rope_type", "default")
    if rope_type == "ntk":
        theta, rope_type = theta * parameters["factor"] ** (dim / (dim - 2)), "default"
    plain = [theta ** (-2 * i / dim) for i in range(dim // 2)]
    if rope_type == "default":
        return plain, 1.0
    if rope_type == "linear":
        return [frequency / parameters["factor"] for frequency in plain], 1.0
    parameters = {key: value for key, value in parameters.items() if key != "partial_rotary_factor"}
    llama = LlamaConfig(head_dim=dim, max_position_embeddings=max_position_embeddings, rope_parameters=parameters)
    frequencies, factor = ROPE_INIT_FUNCTIONS[rope_type](llama, torch.device("cpu"), seq_len=length)
    return frequencies.double().tolist(), factor


def rotate(x, positions, frequencies, factor, interleaved):
    """One head's vectors [length, dim], turned in planes (2i, 2i+1) if interleaved, else (i, i + dim/2) (arXiv
    2104.09864).
    """
    angles = torch.tensor([[p * frequency for frequency in frequencies] for p in positions], dtype=torch.float64)
    cos, sin = (factor * angles.cos()).to(x.dtype), (factor * angles.sin()).to(x.dtype)
    half = len(frequencies)
    first, second = (x[:, 0::2], x[:, 1::2]) if interleaved else (x[:, :half], x[:, half:])
    turned_first, turned_second = first * cos - second * sin, second * cos + first * sin
    if interleaved:
        return torch.stack([turned_first, turned_second], dim=-1).flatten(1)
    return torch.cat([turned_first, turned_second], dim=1)


def document_length(row, slot):
    """The largest position of the slot's document plus one: two RoPE types stretch with it. At padding, any."""
    own = [position for position, number in zip(row.position, row.document, strict=True) if number is not None]
    if row.document[slot] is not None:
        own = [row.position[other] for other in range(len(row)) if row.document[other] == row.document[slot]]
    return max(own, default=0) + 1


def rope(config, x, row):
    """One head's vectors [tokens, dim]: the first `partial_rotary_factor` of the channels turn with the token's
    position; with `rope_2d` the first half of those by the position and the second half by the block position, each
    half with frequencies of its own size.
    """
    if config.position_embedding_type != "rope":
        return x
    parameters = config.rope_parameters or {}
    rotated = int(x.shape[1] * parameters.get("partial_rotary_factor", 1.0))
    axes = [row.position, row.block_position] if config.rope_2d else [row.position]
    dim = rotated // len(axes)
    lengths = [document_length(row, slot) for slot in range(len(row))]
    turned = {}
    for length in set(lengths):
        frequencies, factor = rope_frequencies(parameters, dim, config.max_position_embeddings, length)
        pieces = [
            rotate(x[:, axis * dim : (axis + 1) * dim], positions, frequencies, factor, config.rope_interleaved)
            for axis, positions in enumerate(axes)
        ]
        turned[length] = torch.cat([*pieces, x[:, rotated:]], dim=1)
    return torch.stack([turned[length][slot] for slot, length in enumerate(lengths)])


def sinusoid(position, size):
    """Attention Is All You Need, section 3.5: sines in the even channels, cosines in the odd ones."""
    channels = []
    for i in range(size // 2):
        angle = position / 10000 ** (2 * i / size)
        channels += [math.sin(angle), math.cos(angle)]
    return channels


def position_embedding(config, weights, row):
    """What is added to a row's token embeddings: [length, hidden], or 0."""
    if config.position_embedding_type == "sinusoidal":
        table = [sinusoid(position, config.hidden_size) for position in row.position]
        return torch.tensor(table, dtype=weights["embed_tokens.weight"].dtype)
    if config.position_embedding_type == "learned":
        return weights["embed_positions.weight"][row.position]
    if config.position_embedding_type == "glm_2d":
        return (
            weights["embed_positions.weight"][row.position]
            + weights["embed_block_positions.weight"][row.block_position]
        )
    return 0.0


def embed(config, weights, tokens, row, training):
    embeddings = weights["embed_tokens.weight"][tokens]
    if training:
        shrink = config.embedding_gradient_scale
        embeddings = shrink * embeddings + (1 - shrink) * embeddings.detach()
    embeddings = embeddings + position_embedding(config, weights, row)
    return norm(config, weights, "embed_layernorm", embeddings) if config.embedding_norm else embeddings


def linear(weights, name, x):
    y = x @ weights[f"{name}.weight"].T
    return y + weights[f"{name}.bias"] if f"{name}.bias" in weights else y


def norm(config, weights, name, x):
    """LayerNorm (arXiv 1607.06450) or RMSNorm (arXiv 1910.07467) over the last dimension."""
    if config.norm_type == "layernorm":
        x = x - x.mean(-1, keepdim=True)
    x = x / (x.pow(2).mean(-1, keepdim=True) + config.norm_eps).sqrt() * weights[f"{name}.weight"]
    return x + weights[f"{name}.bias"] if f"{name}.bias" in weights else x


def attend(query, keys, values, biases):
    """One query [d] over the keys it sees [n, d], with one bias each."""
    scores = keys @ query / math.sqrt(query.shape[0]) + torch.tensor(biases, dtype=query.dtype)
    return scores.softmax(-1) @ values


def attention(config, weights, x, row, model_dtype):
    """Self-attention of one row: [length, hidden] -> [length, hidden]. Consecutive query heads share a key head. A
    padding slot attends to nothing and gives zeros.
    """
    heads = config.num_attention_heads
    key_heads = config.num_key_value_heads or heads
    dim = config.head_dim or config.hidden_size // heads
    slots = range(len(row))

    def split(name, count, rotated):
        projected = linear(weights, f"self_attn.{name}_proj", x).reshape(len(row), count, dim)
        if rotated and config.qk_norm:
            projected = norm(config, weights, f"self_attn.{name}_norm", projected)
        each = [projected[:, head] for head in range(count)]
        return [rope(config, x, row) for x in each] if rotated else each

    queries, keys, values = split("q", heads, True), split("k", key_heads, True), split("v", key_heads, False)
    outputs = []
    for head in range(heads):
        shared = head // (heads // key_heads)
        for query in slots:
            added = [0.0] * len(row) if row.own_mask is None else row.own_mask[head][query]
            seen = [key for key in slots if sees(config, row, added, query, key)]
            if not row.real[query]:
                outputs.append(torch.zeros(dim, dtype=x.dtype))
                continue
            biases = [
                added[key] + bias(config, head, row.position[query], row.position[key], model_dtype) for key in seen
            ]
            outputs.append(attend(queries[head][query], keys[shared][seen], values[shared][seen], biases))
    joined = torch.stack(outputs).reshape(heads, len(row), dim).transpose(0, 1).reshape(len(row), heads * dim)
    return linear(weights, "self_attn.o_proj", joined)


def feed_forward(config, weights, x):
    """GLU variants (arXiv 2002.05202): a gate times a linear map; else a plain two-layer perceptron, or experts."""
    if config.mlp_type == "moe":
        return torch.stack([mixture_of_experts(config, weights, token) for token in x])
    up = linear(weights, "mlp.up_proj", x)
    if config.mlp_type == "mlp":
        return linear(weights, "mlp.down_proj", ACT2FN[config.hidden_act](up))
    return linear(weights, "mlp.down_proj", gated(config, linear(weights, "mlp.gate_proj", x), up))


def gated(config, gate, up):
    if config.hidden_act == "gtu":
        return torch.sigmoid(gate) * torch.tanh(up)
    if config.hidden_act == "bilinear":
        return gate * up
    return ACT2FN[config.hidden_act](gate) * up


def largest(numbers, count):
    """Indices of the `count` largest numbers, the largest first."""
    return sorted(range(len(numbers)), key=lambda index: -numbers[index])[:count]


def mixture_of_experts(config, weights, token):
    """One token's vector (Mixtral, arXiv 2401.04088, section 2.1): the experts that the router finds most probable,
    each weighted by its share of their probabilities. An expert's gate lies before its up projection in one matrix.
    """
    probabilities = (weights["mlp.gate.weight"] @ token).softmax(-1)
    chosen = largest(probabilities.tolist(), config.num_experts_per_tok)
    shares = {expert: probabilities[expert] / sum(probabilities[other] for other in chosen) for expert in chosen}
    result = 0.0
    for expert, share in shares.items():
        gate_up = weights["mlp.experts.gate_up_proj"][expert] @ token
        inner = gated(config, gate_up[: config.intermediate_size], gate_up[config.intermediate_size :])
        result = result + share * (weights["mlp.experts.down_proj"][expert] @ inner)
    return result


def router_loss(router_logits, experts_per_token, real):
    """Switch Transformer's load-balancing loss (arXiv 2101.03961, section 2.2) over all layers and real tokens: the
    number of experts times the sum over experts of (tokens sent to it, mean probability of it).

    `router_logits`: a list of tokens for each layer, each a tensor [experts]; `real`: a bool for each token.
    """
    experts = router_logits[0].shape[1]
    tokens = [
        token.softmax(-1)
        for layer in router_logits
        for token, counts in zip(layer, real.flatten().tolist(), strict=True)
        if counts
    ]
    total = 0.0
    for expert in range(experts):
        sent = sum(expert in largest(token.tolist(), experts_per_token) for token in tokens) / len(tokens)
        total = total + sent * sum(token[expert] for token in tokens) / len(tokens)
    return experts * total


def pre(h, attn, mlp, norms, config):
    h = h + attn(norms("input_layernorm", h))
    return h + mlp(norms("post_attention_layernorm", h))


def parallel(h, attn, mlp, norms, config):
    """GPT-J's (one norm) and Falcon-40B's (two)."""
    attention_input = norms("input_layernorm", h)
    mlp_input = attention_input if config.num_parallel_norms == 1 else norms("post_attention_layernorm", h)
    return h + attn(attention_input) + mlp(mlp_input)


def post(h, attn, mlp, norms, config):
    h = norms("input_layernorm", h + attn(h))
    return norms("post_attention_layernorm", h + mlp(h))


def deepnorm(h, attn, mlp, norms, config):
    """DeepNet (arXiv 2203.00555), decoder-only."""
    alpha = config.deepnorm_alpha or (2 * config.num_hidden_layers) ** 0.25
    h = norms("input_layernorm", alpha * h + attn(h))
    return norms("post_attention_layernorm", alpha * h + mlp(h))


def sandwich(h, attn, mlp, norms, config):
    """CogView (arXiv 2105.13290): a second norm at the end of each branch."""
    h = h + norms("attention_output_layernorm", attn(norms("input_layernorm", h)))
    return h + norms("mlp_output_layernorm", mlp(norms("post_attention_layernorm", h)))


WIRINGS = {"pre": pre, "post": post, "deepnorm": deepnorm, "sandwich": sandwich}


def under(weights, prefix):
    return {name[len(prefix) :]: weight for name, weight in weights.items() if name.startswith(prefix)}


def run_row(config, weights, tokens, row, training, model_dtype):
    """Final hidden states of one row: [length] token ids -> [length, hidden]."""
    model = under(weights, "model.")
    h = embed(config, model, tokens, row, training)
    wiring = parallel if config.parallel_residual else WIRINGS[config.norm_placement]
    for index in range(config.num_hidden_layers):
        layer = under(model, f"layers.{index}.")
        h = wiring(
            h,
            attn=lambda x, layer=layer: attention(config, layer, x, row, model_dtype),
            mlp=lambda x, layer=layer: feed_forward(config, layer, x),
            norms=lambda name, x, layer=layer: norm(config, layer, name, x),
            config=config,
        )
    default = config.norm_placement in ("pre", "sandwich")
    final_norm = default if config.final_norm is None else config.final_norm
    return norm(config, model, "norm", h) if final_norm else h


def head(config, weights, h):
    """The language-model head; tied when the weights hold none of its own or the config says so."""
    tied = config.tie_word_embeddings or "lm_head.weight" not in weights
    weight = weights["model.embed_tokens.weight"] if tied else weights["lm_head.weight"]
    if config.norm_head:
        weight = torch.stack([row / row.norm().clamp(min=1e-12) for row in weight])
    return h @ weight.T


def reference_hidden_states(
    config,
    state_dict,
    input_ids,
    attention_mask=None,
    position_ids=None,
    prefix_mask=None,
    document_ids=None,
    block_position_ids=None,
    training=False,
    model_dtype=torch.float32,
    own_mask=None,
):
    """The final hidden states, [batch, length, hidden] in the dtype of the weights.

    `training` switches the embedding-gradient shrink on (dropout is not modelled); `model_dtype` is what Bloom's and
    Falcon's rounded ALiBi is rounded to; `own_mask` is added to the scores, [batch or 1, heads or 1, length, length].
    """
    if prefix_mask is not None and config.attention_type != "prefix":
        raise ValueError(f"prefix_mask needs attention_type='prefix', got {config.attention_type!r}")
    rows = describe_rows(input_ids.shape, attention_mask, position_ids, prefix_mask, document_ids, block_position_ids)
    if own_mask is not None:
        masks = own_mask.expand(len(rows), config.num_attention_heads, -1, -1).tolist()
        rows = [replace(row, own_mask=mask) for row, mask in zip(rows, masks, strict=True)]
    return torch.stack(
        [
            run_row(config, state_dict, tokens, row, training, model_dtype)
            for tokens, row in zip(input_ids, rows, strict=True)
        ]
    )


def reference_logits(config, state_dict, input_ids, *args, **kwargs):
    """Logits [batch, length, vocab] of `MiniLLMForCausalLM` with these weights: the arguments of
    `reference_hidden_states`.
    """
    hidden = reference_hidden_states(config, state_dict, input_ids, *args, **kwargs)
    return head(config, state_dict, hidden)


def reference_greedy(
    config, state_dict, input_ids, attention_mask=None, prefix_mask=None, max_new_tokens=8, eos_token_id=None
):
    """Greedy decoding by running the whole text anew for each token, one row at a time and without padding.

    Returns one list of new tokens a row, cut after the end token. `prefix_mask` is that of the prompt.
    """
    answers = []
    for index, tokens in enumerate(input_ids):
        real = torch.ones_like(tokens) if attention_mask is None else attention_mask[index]
        text = tokens[real.bool()].tolist()
        prefix = None if prefix_mask is None else prefix_mask[index][real.bool()].tolist()
        answer = []
        while len(answer) < max_new_tokens and (not answer or answer[-1] != eos_token_id):
            mask = None if prefix is None else torch.tensor([prefix + [0] * len(answer)])
            logits = reference_logits(config, state_dict, torch.tensor([text + answer]), prefix_mask=mask)
            answer.append(logits[0, -1].argmax().item())
        answers.append(answer)
    return answers


def initial_std(config, name, shape):
    """Standard deviation of a fresh parameter by its name: 0.0 means constant (zeros for biases, ones for norms).

    DeepNet (arXiv 2203.00555, figure 2): Xavier-normal with gain beta for value, output and feed-forward, 1 for query
    and key. GPT-2's residual scaling: the maps that write into the residual stream are divided by sqrt(2 * layers).
    """
    if name.endswith(".bias") or "norm" in name:
        return 0.0
    layer_map = ".layers." in name and "mlp.gate." not in name  # the router is no part of either scheme
    if layer_map and config.norm_placement == "deepnorm":
        beta = config.deepnorm_beta or (8 * config.num_hidden_layers) ** -0.25
        gain = 1.0 if ("q_proj" in name or "k_proj" in name) else beta
        # Of a stack of experts, each projection of each expert counts as a matrix.
        fans = config.intermediate_size + config.hidden_size if ".experts." in name else shape[0] + shape[1]
        return gain * math.sqrt(2 / fans)
    if layer_map and config.scale_residual_init and ("o_proj" in name or "down_proj" in name):
        return config.initializer_range / math.sqrt(2 * config.num_hidden_layers)
    return config.initializer_range
