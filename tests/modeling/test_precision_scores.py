"""Half precision must not touch probabilities, losses, sums over many and the scores of decoding: they are float32.

Each value is held against the same formula in float64 on the *rounded* inputs, so that only the arithmetic in between
counts.
"""

from types import SimpleNamespace

import pytest
import torch
from attention_calls import attention_of
from fill_cases import WordTokenizer, fill_model
from matrix_cases import VOCAB, batch, loud_model, real_tokens, tiny_config
from precision_cases import SEED, assert_rounded_once, each_half, randn
from reference import alibi_slopes, router_loss
from torch.nn import functional as F
from transformers import AttentionInterface, DynamicCache
from transformers.generation import LogitsProcessor, LogitsProcessorList
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from variants import variants

from minillm import blocked_attention
from minillm.attention import eager_attention_forward
from minillm.evaluation.perplexity import token_nll
from minillm.feed_forward import MiniLLMExperts, MiniLLMRouter
from minillm.loss import linear_cross_entropy, load_balancing_loss
from minillm.position_schemes import POSITION_BIASES
from minillm.tuning import tuning


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


@each_half
@pytest.mark.parametrize("scheme", ["sandwich", "alibi"])
def test_attention_in_blocks_keeps_the_digits_of_its_bias(scheme, dtype, monkeypatch):
    monkeypatch.setattr(tuning, "open_block_keys", 16)
    length, heads = 1500, 2
    fields = {"sandwich": {"sandwich_dim": 64}, "alibi": {}}[scheme]
    sizes = {"num_attention_heads": heads, "max_position_embeddings": length}
    config = tiny_config(position_embedding_type=scheme, **sizes, **fields)
    config._attn_implementation = "sdpa"
    mask = attention_of(config, torch.zeros(1, length, 32, dtype=dtype)).attention_mask
    assert isinstance(mask, blocked_attention.BlockedMask)
    # The bias alone makes the scores.
    query = torch.zeros(1, heads, length, 8, dtype=dtype)
    value = randn(1, heads, length, 8, dtype=dtype).requires_grad_()
    found = blocked_attention.blocked_attention_forward(None, query, query, value, mask, 0.0, 0.3)[0]
    positions = torch.arange(length)[None]
    bias = POSITION_BIASES[scheme](config, positions, positions, dtype).dense().double()
    visible = torch.ones(length, length, dtype=torch.bool).tril()
    exact = bias.masked_fill(~visible, -torch.inf).softmax(-1)
    coefficients = randn(*found.shape, dtype=dtype, seed=1)
    gradient = torch.autograd.grad(found, value, coefficients)[0]
    pairs = [
        (found.double(), (exact @ value.detach().double()).transpose(1, 2)),
        (gradient.double(), exact.transpose(2, 3) @ coefficients.double().transpose(1, 2)),
    ]
    for own, true in pairs:
        # The kernel rounds the probabilities and each part's result; sums over the blocks of queries are float32.
        assert (own - true).norm() <= 0.6 * torch.finfo(dtype).eps * true.norm()


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


class Recorder(LogitsProcessor):
    def __init__(self):
        self.scores = []

    def __call__(self, input_ids, scores):
        self.scores.append(scores.clone())
        return scores


@pytest.mark.parametrize("sampled", [False, True], ids=["greedy", "sampled"])
@each_half
def test_scores_of_decoding(dtype, sampled):
    model = loud_model(tiny_config()).to(dtype)
    ids = torch.tensor([[3, 4, 5], [6, 7, 8]])
    recorder = Recorder()
    torch.manual_seed(SEED)
    tokens = model.generate(
        ids,
        do_sample=sampled,
        temperature=0.7 if sampled else None,
        max_new_tokens=4,
        eos_token_id=None,
        pad_token_id=0,
        logits_processor=LogitsProcessorList([recorder]),
    )
    for step, scores in enumerate(recorder.scores):
        assert scores.dtype == torch.float32
        with torch.no_grad():
            logits = model(tokens[:, : 3 + step], use_cache=False).logits[:, -1]
        # With and without a cache half precision rounds differently.
        assert (scores - logits.float()).abs().max() <= 8 * torch.finfo(dtype).eps * logits.abs().max()


MODELS = variants(
    "rope qk_norm-gqa prefix-alibi sandwich-sandwich_norm layernorm-learned-mlp layernorm-deepnorm-sinusoidal "
    "moe norm_head-window"
)


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


@pytest.mark.parametrize("back_end", ["eager", "sdpa"])
@pytest.mark.parametrize("scheme", ["alibi", "sandwich"])
@each_half
def test_the_bias_of_a_decoding_step_is_exact_at_8192_tokens(scheme, back_end, dtype, monkeypatch):
    """What is added to the scores of a new token, against float64; in the model's dtype it would be off by 0.06."""
    fields = {"position_embedding_type": scheme, "num_attention_heads": 6, "hidden_size": 36, "sandwich_dim": 6}
    if scheme == "alibi":
        del fields["sandwich_dim"]
    config = tiny_config(num_hidden_layers=1, **fields)
    model = loud_model(config).to(dtype)
    model.set_attn_implementation(back_end)
    added = []
    attend = ALL_ATTENTION_FUNCTIONS.get_interface(back_end, eager_attention_forward)

    def watched(module, query, key, value, attention_mask, **kwargs):
        added.append(attention_mask)
        return attend(module, query, key, value, attention_mask, **kwargs)

    monkeypatch.setitem(AttentionInterface._global_mapping, back_end, watched)
    cache = DynamicCache()
    with torch.no_grad():
        # Keys and values do not matter here: a cache of zeros is as good.
        cache.update(*torch.zeros(2, 1, 6, 8192, 6, dtype=dtype), 0)
        model(torch.tensor([[3]]), past_key_values=cache)
    distance = torch.arange(8192, -1, -1, dtype=torch.float64)
    for head, bias in enumerate(added[0][0, :, 0].double()):
        if scheme == "alibi":
            expected = -alibi_slopes(6)[head] * distance
        else:
            angles = distance[:, None] / 10000.0 ** (torch.arange(0, 6, 2, dtype=torch.float64) / 6)
            expected = angles.cos().sum(-1) / (8 * (head + 1) / 6)
        near = expected > -20
        assert (bias - expected)[near].abs().max() < 2e-6 * 20
