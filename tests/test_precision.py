"""What half precision must not touch: statistics, angles, probabilities, losses and sums are computed in float32.

Each value is held against the same formula in float64 on the *rounded* inputs, so that only the arithmetic in between
counts. What float32 computes and half precision then stores is that value rounded once: off by half a unit in the last
place. Arithmetic in half precision rounds several times, and shows.
"""

from types import SimpleNamespace

import pytest
import torch
from fill_cases import WordTokenizer, fill_model
from matrix_cases import VOCAB, batch, loud_model, real_tokens, tiny_config
from reference import alibi_slopes, rope_frequencies, router_loss, sandwich_bias, sinusoid
from torch.nn import functional as F
from transformers import AutoModelForCausalLM
from transformers.generation import LogitsProcessor, LogitsProcessorList
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from minillm import MiniLLMForCausalLM
from minillm.attention import eager_attention_forward
from minillm.evaluation.perplexity import token_nll
from minillm.feed_forward import MiniLLMExperts, MiniLLMRouter
from minillm.loss import linear_cross_entropy, load_balancing_loss
from minillm.normalization import NORMS
from minillm.positions import POSITION_BIASES, MiniLLMRotaryEmbedding, sinusoidal_embedding

HALVES = [torch.bfloat16, torch.float16]
each_half = pytest.mark.parametrize("dtype", HALVES, ids=["bfloat16", "float16"])
SEED = 0
FAR = [0, 1, 2, 255, 257, 4_097, 65_537, 99_999, 100_000, 131_071]
"""Positions of which bfloat16 knows but the first four, and float16 none of the last four."""


def randn(*shape, dtype=torch.float32, scale=1.0, seed=SEED):
    print(f"seed {seed}")
    return (scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))).to(dtype)


def assert_rounded_once(got, exact, dtype, slack=0.0, relative=1e-5):
    """`got` is in `dtype` and as near to the float64 `exact` as one rounding brings it; float32 in between may add
    `relative` of the value, and `slack`, a number or a tensor."""
    assert got.dtype == dtype
    allowed = (torch.finfo(dtype).eps / 2 + relative) * exact.abs() + slack + torch.finfo(dtype).smallest_normal
    excess = ((got.double() - exact).abs() / allowed).max().item()
    assert excess <= 1, f"{excess:.2f} times as far as one rounding to {dtype} brings it"


# --- norms ---

SCALES = {"ordinary": 1.0, "squares above float16": 3e3, "squares below float16": 1e-4}


def exact_norm(norm_type, x, eps):
    centred = x - x.mean(-1, keepdim=True) if norm_type == "layernorm" else x
    return centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt()


@each_half
@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("norm_type", NORMS)
def test_statistics_of_norms(norm_type, scale, dtype):
    config = tiny_config(norm_type=norm_type, norm_eps=1e-12)
    norm = NORMS[norm_type](config, 512).to(dtype)
    x = randn(64, 512, dtype=dtype, scale=SCALES[scale]).requires_grad_()
    # Those of LayerNorm are differences of numbers as large as the mean square.
    slack = 1e-5 if norm_type == "layernorm" else 0.0
    assert_rounded_once(norm(x), exact_norm(norm_type, x.double(), 1e-12), dtype, slack)


@each_half
def test_statistics_of_norms_have_exact_gradients(dtype):
    norm = NORMS["rmsnorm"](tiny_config(), 512).to(dtype)
    x, coefficients = randn(64, 512, dtype=dtype).requires_grad_(), randn(64, 512, dtype=dtype, seed=1)
    found = torch.autograd.grad(norm(x), x, coefficients)[0]
    wide = x.detach().double().requires_grad_()
    exact = torch.autograd.grad(exact_norm("rmsnorm", wide, 1e-6), wide, coefficients.double())[0]
    assert_rounded_once(found, exact, dtype, slack=1e-5)


@each_half
def test_rmsnorm_rounds_where_llamas_does(dtype):
    ours, theirs = (kind.to(dtype) for kind in (NORMS["rmsnorm"](tiny_config(), 64), LlamaRMSNorm(64, 1e-6)))
    with torch.no_grad():
        for norm in (ours, theirs):
            norm.weight.copy_(1 + randn(64, scale=0.3, seed=1))
    x = randn(100, 64, dtype=dtype, scale=5.0)
    assert torch.equal(ours(x), theirs(x))


# --- rotary angles ---

ROPES = {
    "plain": {},
    "interleaved": {"rope_interleaved": True},
    "two axes": {"rope_2d": True},
    "partial": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "partial_rotary_factor": 0.5}},
    "ntk": {"rope_parameters": {"rope_type": "ntk", "rope_theta": 1e4, "factor": 4.0}},
    "scaled cosines": {
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 1e4,
            "factor": 8.0,
            "original_max_position_embeddings": 32,
        }
    },
}


def exact_rotation(config, frequencies, factor):
    """Cosines and signed sines of one axis at the positions of `FAR`, and their angles, in float64."""
    angles = torch.tensor(FAR, dtype=torch.float64)[:, None] * torch.as_tensor(frequencies, dtype=torch.float64)
    cos, sin = angles.cos() * factor, angles.sin() * factor
    if config.rope_interleaved:
        return cos.repeat_interleave(2, -1), torch.stack((-sin, sin), -1).flatten(-2), angles.repeat_interleave(2, -1)
    return torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1), torch.cat((angles, angles), -1)


def assert_exact_rotation(rotary, config, frequencies, factor, dtype):
    positions = torch.tensor([FAR])
    axes = (positions, positions) if config.rope_2d else (positions,)
    found = rotary(torch.zeros(1, len(FAR), 32, dtype=dtype), *axes)
    *exact, angles = (part.repeat(1, len(axes)) for part in exact_rotation(config, frequencies, factor))
    for own, true in zip(found, exact, strict=True):
        # A float32 angle is off by its last place, and its frequency by two.
        assert_rounded_once(own[0, 0], true, dtype, slack=factor * 3e-7 * angles + 1e-6)


@pytest.mark.parametrize("autocast", [False, True], ids=["", "autocast"])
@pytest.mark.parametrize("dtype", [*HALVES, torch.float32], ids=["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("rope", ROPES)
def test_angles_of_far_positions(rope, dtype, autocast):
    config = tiny_config(**{"head_dim": 16, **ROPES[rope]})
    dim = int(16 * config.rope_parameters.get("partial_rotary_factor", 1)) // (2 if config.rope_2d else 1)
    expected = rope_frequencies(config.rope_parameters, dim, config.max_position_embeddings, 1)
    rotary = MiniLLMRotaryEmbedding(config)
    assert rotary.inv_freq.dtype == torch.float32
    torch.testing.assert_close(rotary.inv_freq.double(), torch.tensor(expected[0]).double(), rtol=3e-7, atol=0)
    with torch.autocast("cpu", torch.bfloat16 if dtype == torch.float32 else dtype, enabled=autocast):
        assert_exact_rotation(rotary, config, *expected, dtype)


@each_half
@pytest.mark.parametrize("way", ["to", "by name"])
def test_angles_after_a_cast_are_those_of_the_frequencies_it_left(way, dtype):
    config = tiny_config(head_dim=16)
    model = loud_model(config)
    by_name = model.half if dtype == torch.float16 else model.bfloat16
    rotary = (model.to(dtype) if way == "to" else by_name()).model.rotary_emb
    assert_exact_rotation(rotary, config, rotary.inv_freq.double(), 1.0, dtype)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Folders of models of each scheme whose scores depend on distances alone."""
    root = tmp_path_factory.mktemp("models")
    for name, fields in RELATIVE.items():
        loud_model(tiny_config(**fields)).save_pretrained(root / name)
    return root


RELATIVE = {
    "rope": {},
    "rope_interleaved": {"rope_interleaved": True, "num_key_value_heads": 2},
    "rope_2d": {"rope_2d": True},
    "alibi": {"position_embedding_type": "alibi"},
    "sandwich": {"position_embedding_type": "sandwich", "sandwich_dim": 6},
}


@pytest.mark.parametrize("way", ["loaded", "autocast"])
@each_half
@pytest.mark.parametrize("scheme", RELATIVE)
def test_far_away_a_model_says_what_it_says_at_the_start(scheme, dtype, way, saved):
    """Of relative positions only distances count, which are the same 100,000 tokens later."""
    model = AutoModelForCausalLM.from_pretrained(saved / scheme, dtype=torch.float32 if way == "autocast" else dtype)
    if scheme.startswith("rope"):
        kept, fresh = model.model.rotary_emb.inv_freq, MiniLLMRotaryEmbedding(model.config).inv_freq
        assert kept.dtype == torch.float32 and torch.equal(kept, fresh)
    ids, near = batch(model.config, "plain")["input_ids"], torch.arange(10)[None]
    axes = ("position_ids", "block_position_ids") if model.config.rope_2d else ("position_ids",)
    with torch.no_grad(), torch.autocast("cpu", dtype, enabled=way == "autocast"):
        runs = [
            model(ids, torch.ones_like(ids), **dict.fromkeys(axes, near + start)).logits.double()
            for start in (0, 100_000)
        ]
    # Of a few layers in half precision; a wrong angle moves all of it.
    assert (runs[0] - runs[1]).norm() <= 8 * torch.finfo(dtype).eps * runs[0].norm()


# --- other positions ---


@pytest.mark.parametrize("size", [24, 5])
@pytest.mark.parametrize("dtype", [*HALVES, torch.float32], ids=["bfloat16", "float16", "float32"])
def test_sinusoids_of_far_positions(dtype, size):
    """Of an odd size, too, the last channel of which is a sine."""
    found = sinusoidal_embedding(torch.tensor([FAR]), size, dtype)[0]
    channels = torch.arange(size, dtype=torch.float64)
    angles = torch.tensor(FAR).double()[:, None] * 10000.0 ** -((channels - channels % 2) / size)
    exact = torch.where(channels % 2 == 0, angles.sin(), angles.cos())
    assert_rounded_once(found, exact, dtype, slack=5e-7 * angles + 1e-6)


def test_a_model_adds_sinusoids_in_its_own_dtype():
    model = loud_model(tiny_config(position_embedding_type="sinusoidal", num_hidden_layers=1)).bfloat16()
    seen = []
    model.model.layers[0].register_forward_pre_hook(lambda layer, inputs: seen.append(inputs[0]))
    positions = torch.tensor([FAR])
    ids = torch.arange(len(FAR))[None]
    model(ids, attention_mask=torch.ones_like(ids), position_ids=positions)
    table = torch.tensor([sinusoid(position, 32) for position in FAR], dtype=torch.float64)
    exact = model.model.embed_tokens(ids)[0].double() + table
    assert seen[0].dtype == torch.bfloat16
    # Twice rounded, and the angles of 131,071 positions to two hundredths.
    assert (seen[0][0].double() - exact).abs().max() <= torch.finfo(torch.bfloat16).eps * exact.abs().max() + 0.04


BIASES = {
    "alibi": {"position_embedding_type": "alibi"},
    # Their slopes are no powers of two.
    "alibi of twelve heads": {
        "position_embedding_type": "alibi",
        "num_attention_heads": 12,
        "hidden_size": 48,
        "alibi_scale": 0.7,
    },
    "sandwich": {"position_embedding_type": "sandwich", "sandwich_dim": 12},
}


@each_half
@pytest.mark.parametrize("scheme", BIASES)
def test_biases_of_far_positions(scheme, dtype):
    config = tiny_config(**BIASES[scheme])
    queries, keys = [1_000_000, 1_000_003, 1_048_577], [0, 999_000, 999_999, 1_000_000, 1_000_003]
    positions = torch.tensor([queries]), torch.tensor([keys])
    bias = POSITION_BIASES[config.position_embedding_type](config, *positions, dtype)
    found = bias.dense()[0]
    slopes = [slope * config.alibi_scale for slope in alibi_slopes(config.num_attention_heads)]

    def exact(head, query, key):
        return sandwich_bias(config, head, query, key) if scheme == "sandwich" else -slopes[head] * abs(query - key)

    for head in range(config.num_attention_heads):
        expected = [[exact(head, query, key) for key in keys] for query in queries]
        torch.testing.assert_close(found[head].double(), torch.tensor(expected).double(), rtol=3e-7, atol=2e-6)
        # One by one the angles are of a float32 distance.
        for at, query in enumerate(queries):
            slack = 2e-6 + 2e-7 * (query - keys[3])
            assert bias[0, head, at, 3].item() == pytest.approx(expected[at][3], rel=3e-7, abs=slack)


# --- probabilities ---


@each_half
def test_eager_softmax_and_its_gradient(dtype):
    """Of one head with values of which each shows the probability of its key."""
    keys = 64
    module = SimpleNamespace(num_key_value_groups=1, training=False)
    # The mask alone makes the scores, so that no product is rounded before the softmax.
    mask = randn(1, 1, 200, keys, dtype=dtype, scale=3.0).requires_grad_()
    query, key = torch.zeros(1, 1, 200, 8, dtype=dtype), torch.zeros(1, 1, keys, 8, dtype=dtype)
    value = torch.eye(keys, dtype=dtype)[None, None]
    output, probabilities = eager_attention_forward(module, query, key, value, mask, scaling=0.3)
    wide = mask.detach().double().requires_grad_()
    exact = wide.softmax(-1)
    # Below 2 ** -14 float16 has a fixed grain.
    grain = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    assert_rounded_once(probabilities, exact, dtype, grain)
    assert torch.equal(output.transpose(1, 2), probabilities)
    # A key's share of what the others lose: in half precision the probabilities that the sum is made of are rounded.
    coefficients = randn(1, 200, 1, keys, dtype=dtype, seed=1)
    found = torch.autograd.grad(output, mask, coefficients)[0]
    true = torch.autograd.grad(exact, wide, coefficients.double().transpose(1, 2))[0]
    assert_rounded_once(found, true, dtype, grain + 1e-6)


def router_of(dtype, experts=8, top_k=3):
    router = MiniLLMRouter(tiny_config(mlp_type="moe", num_local_experts=experts, num_experts_per_tok=top_k))
    with torch.no_grad():
        router.weight.copy_(randn(experts, 32, scale=0.5, seed=1))
    return router.to(dtype)


@pytest.mark.parametrize("autocast", [False, True], ids=["", "autocast"])
@each_half
def test_router_probabilities(dtype, autocast):
    router = router_of(torch.float32 if autocast else dtype)
    tokens = randn(200, 32, dtype=router.weight.dtype)
    with torch.autocast("cpu", dtype, enabled=autocast):
        logits, weights, experts = router(tokens)
    assert logits.dtype == dtype
    exact = logits.double().softmax(-1).gather(1, experts)
    assert_rounded_once(weights, exact / exact.sum(-1, keepdim=True), torch.float32, relative=1e-6)


@each_half
def test_experts_are_weighted_in_float32(dtype):
    config = tiny_config(mlp_type="moe", num_local_experts=2)
    config._experts_implementation = "eager"
    experts = MiniLLMExperts(config).to(dtype)
    with torch.no_grad():
        experts.gate_up_proj.copy_(randn(*experts.gate_up_proj.shape))
        experts.down_proj.copy_(randn(*experts.down_proj.shape, scale=0.3, seed=1))
        # The second expert says nothing, so that no sum is rounded.
        experts.down_proj[1] = 0
    tokens, weights = randn(50, 32, dtype=dtype, seed=2), randn(50, 2, seed=3).softmax(-1)
    found = experts(tokens, torch.tensor([[0, 1]]).expand(50, 2), weights)
    alone = experts(tokens, torch.tensor([[0, 1]]).expand(50, 2), torch.tensor([[1.0, 0.0]]).expand(50, 2))
    assert_rounded_once(found, alone.double() * weights[:, :1].double(), dtype)


@each_half
def test_load_balancing_loss(dtype):
    logits = [randn(3000, 8, dtype=dtype, scale=2.0, seed=seed) for seed in range(2)]
    real = torch.arange(3000).view(3, 1000) % 7 != 0
    found = load_balancing_loss(tuple(logits), 2, real.long())
    assert found.dtype == torch.float32
    # Equal logits, which rounding makes many, may go to either of two experts.
    probabilities = [layer[real.flatten()].double().softmax(-1) for layer in logits]
    chosen = [layer[real.flatten()].float().softmax(-1).topk(2).indices for layer in logits]
    sent = torch.cat(chosen).flatten().bincount(minlength=8) / (2 * int(real.sum()))
    exact = 8 * (sent.double() * torch.cat(probabilities).mean(0)).sum()
    assert found.item() == pytest.approx(exact.item(), rel=1e-6)
    few = tuple(layer[:20] for layer in logits)
    exact = router_loss([layer.double() for layer in few], 2, torch.ones(20, dtype=torch.bool))
    assert load_balancing_loss(few, 2).item() == pytest.approx(exact.item(), rel=1e-6)


# --- losses ---


@each_half
@pytest.mark.parametrize("skip_logits", [False, True])
@pytest.mark.parametrize("way", ["cast", "autocast"])
def test_loss_of_a_model(way, skip_logits, dtype):
    model = loud_model(tiny_config())
    ids = torch.randint(0, VOCAB, (3, 32), generator=torch.Generator().manual_seed(SEED))
    model = model.to(dtype) if way == "cast" else model
    with torch.no_grad(), torch.autocast("cpu", dtype, enabled=way == "autocast"):
        logits = model(ids).logits
        loss = model(ids, labels=ids, skip_logits=skip_logits).loss
    assert logits.dtype == dtype and loss.dtype == torch.float32
    exact = F.cross_entropy(logits[:, :-1].double().flatten(0, 1), ids[:, 1:].flatten())
    assert loss.item() == pytest.approx(exact.item(), rel=1e-6)


@pytest.mark.parametrize("autocast", [False, True], ids=["", "autocast"])
@each_half
def test_sums_over_many_chunks(dtype, autocast):
    """Of 1000 chunks each adds less than half precision keeps of the sum."""
    tokens, vocabulary = 2000, 16
    inputs = [
        randn(*shape, dtype=dtype, seed=seed)
        for seed, shape in enumerate([(tokens, 8), (vocabulary, 8), (vocabulary,)])
    ]
    leaves = [each.float().requires_grad_() if autocast else each.clone().requires_grad_() for each in inputs]
    target = torch.arange(tokens) % 5
    target[::11] = -100
    with torch.autocast("cpu", dtype, enabled=autocast):
        loss = linear_cross_entropy(*leaves[:2], target, leaves[2], chunk=2)
    gradients = torch.autograd.grad(loss, leaves)
    hidden, weight, _ = (each.double() for each in inputs)
    logits = F.linear(*inputs).double().requires_grad_()
    exact = F.cross_entropy(logits, target, reduction="sum")
    assert loss.dtype == torch.float32 and loss.item() == pytest.approx(exact.item(), rel=1e-5)
    assert [each.dtype for each in gradients] == [leaf.dtype for leaf in leaves]
    of_logits = torch.autograd.grad(exact, logits)[0]
    # The gradient by the bias sums the logits' as they are; for the products they are stored in half precision.
    assert_rounded_once(gradients[2], of_logits.sum(0), leaves[2].dtype, slack=1e-3)
    rounded, eps = of_logits.to(dtype).double(), torch.finfo(dtype).eps
    assert_rounded_once(gradients[0].to(dtype), rounded @ weight, dtype, slack=eps)
    # Each chunk's product of two rows is rounded, in either direction.
    noise = eps * (rounded.abs().T @ hidden.abs()) / tokens**0.5
    assert_rounded_once(gradients[1].to(dtype), rounded.T @ hidden, dtype, slack=noise)


@each_half
def test_scores_of_evaluation(dtype):
    model = loud_model(tiny_config()).to(dtype)
    ids = torch.randint(0, VOCAB, (2, 16), generator=torch.Generator().manual_seed(SEED))
    found = token_nll(model, {"input_ids": ids, "labels": ids})
    with torch.no_grad():
        logits = model(ids, use_cache=False).logits[:, :-1].double()
    exact = -logits.log_softmax(-1).gather(-1, ids[:, 1:, None]).flatten()
    assert_rounded_once(found, exact, torch.float32, slack=1e-6, relative=1e-6)


@each_half
def test_scores_of_fills(dtype):
    model = fill_model("rope").to(dtype)
    text, candidate = "w7 w8 [gMASK]", "w9 w10 w11 w12"
    words = WordTokenizer()
    context, span = words([text])["input_ids"][0], words([candidate])["input_ids"][0]
    sop = words.sop_token_id
    with torch.no_grad():
        ids = torch.tensor([[*context, sop, *span]])
        prefix = (torch.arange(ids.shape[1]) < len(context)).long()[None]
        logits = model(ids, prefix_mask=prefix, use_cache=False).logits[0, len(context) :].double()
    targets = torch.tensor([*span, words.eop_token_id])
    exact = logits.log_softmax(-1).gather(1, targets[:, None]).sum()
    found = model.score_fills(text, [candidate], words)
    assert found.dtype == torch.float32 and found.item() == pytest.approx(exact.item(), rel=1e-6)


# --- decoding ---


class Recorder(LogitsProcessor):
    def __init__(self):
        self.scores = []

    def __call__(self, input_ids, scores):
        self.scores.append(scores.clone())
        return scores


@pytest.mark.parametrize("sampled", [False, True], ids=["greedy", "sampled"])
@pytest.mark.parametrize("loop", ["own", "stock"])
@each_half
def test_scores_of_decoding(dtype, loop, sampled, monkeypatch):
    model = loud_model(tiny_config()).to(dtype)
    ran, function = [], MiniLLMForCausalLM._sample.__globals__["sample"]
    monkeypatch.setattr("minillm.decoding.sample", lambda *args, **kwargs: ran.append(1) or function(*args, **kwargs))
    ids = torch.tensor([[3, 4, 5], [6, 7, 8]])
    recorder = Recorder()
    options = {"return_dict_in_generate": True, "output_logits": True} if loop == "stock" else {}
    torch.manual_seed(SEED)
    output = model.generate(
        ids,
        do_sample=sampled,
        temperature=0.7 if sampled else None,
        max_new_tokens=4,
        eos_token_id=None,
        pad_token_id=0,
        logits_processor=LogitsProcessorList([recorder]),
        **options,
    )
    assert bool(ran) == (loop == "own")
    tokens = output if loop == "own" else output.sequences
    for step, scores in enumerate(recorder.scores):
        assert scores.dtype == torch.float32
        with torch.no_grad():
            logits = model(tokens[:, : 3 + step], use_cache=False).logits[:, -1]
        # With and without a cache half precision rounds differently.
        assert (scores - logits.float()).abs().max() <= 8 * torch.finfo(dtype).eps * logits.abs().max()


# --- whole models ---

MODELS = {
    "rope": {},
    "qk norm": {"qk_norm": True, "num_key_value_heads": 2},
    "alibi": {"position_embedding_type": "alibi", "attention_type": "prefix"},
    "sandwich": {"position_embedding_type": "sandwich", "norm_placement": "sandwich"},
    "layernorm": {"norm_type": "layernorm", "position_embedding_type": "learned", "mlp_type": "mlp"},
    "deepnorm": {"norm_type": "layernorm", "norm_placement": "deepnorm", "position_embedding_type": "sinusoidal"},
    "moe": {"mlp_type": "moe", "num_local_experts": 4},
    "norm head": {"norm_head": True, "sliding_window": 3},
}


@pytest.mark.parametrize("back_end", ["eager", "sdpa"])
@each_half
@pytest.mark.parametrize("name", MODELS)
def test_models_in_half_precision_stay_near(name, dtype, back_end):
    """The weights are rounded in both; padding on the left must not overflow either."""
    model = loud_model(tiny_config(**MODELS[name])).to(dtype)
    model.set_attn_implementation(back_end)
    inputs = batch(model.config, "left_padding")
    with torch.no_grad():
        found = model(**inputs, use_cache=False).logits
        model = model.double()
        if name == "moe":
            # Grouped kernels know no float64.
            model.set_experts_implementation("eager")
        exact = model(**inputs, use_cache=False).logits
    real = real_tokens(inputs)
    assert found.dtype == dtype and found.isfinite().all()
    assert (found[real].double() - exact[real]).norm() <= 6 * torch.finfo(dtype).eps * exact[real].norm()
