"""`tp_plan="auto"` over two processes computes what one process does: each has half of the heads and of the
feed-forward, and ALiBi's slopes must be those of its own heads."""

from contextlib import contextmanager
from pathlib import Path

import pytest
import tensor_parallel
import torch
from matrix_cases import rows
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from two_processes import run_on_two_processes
from variant_cases import SIZES, inputs_of, make_loud, model_of

from minillm.tuning import tuning

SCRIPT = Path(tensor_parallel.__file__)
MASK = rows("1111111111", "0001111111")
MODELS = (
    "causal alibi prefix-alibi gqa window-gqa gpt2 sandwich-post parallel_two_norms-norm_head-qk_norm "
    "gpt2-qk_norm-gqa tied deepnorm-layernorm-geglu moe"
).split()
pytestmark = pytest.mark.slow


def build(name):
    # Older transformers cut the head evenly or not at all.
    return model_of(name, vocab_size=20)


def inputs_for(config):
    return {**inputs_of(config, prefix_length=6), "attention_mask": MASK}


def own_mask_for(config):
    """Another additive mask for each head."""
    noise = torch.randn(2, config.num_attention_heads, 10, 10, generator=torch.Generator().manual_seed(5))
    return noise.masked_fill(~torch.ones(10, 10, dtype=torch.bool).tril(), torch.finfo(torch.float32).min)


@contextmanager
def tuned(name, value):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tuning, name, value)
        yield


@pytest.fixture(scope="module")
def launched(tmp_path_factory):
    """The folder of the models and what either process found, by model: one launch serves all of them."""
    root = tmp_path_factory.mktemp("tensor_parallel")
    names = (*MODELS, "mqa")
    for name in names:
        model = build(name)
        model.save_pretrained(root / name)
        inputs = {**inputs_for(model.config), "own_mask": own_mask_for(model.config)}
        torch.save(inputs, root / name / "inputs.pt")
    run_on_two_processes(SCRIPT, root)
    return root, {name: [torch.load(root / f"{name}.{rank}.pt") for rank in (0, 1)] for name in names}


@pytest.fixture
def both(launched):
    return launched[1]


def close(got, expected, what):
    scale = expected.abs().max().clamp(min=1.0)
    assert (got - expected).abs().max() <= 1e-5 * scale, what


@pytest.mark.parametrize("name", MODELS)
def test_logits_equal_those_of_one_process(both, name):
    model = build(name)
    inputs = inputs_for(model.config)
    real = MASK.bool()
    with torch.no_grad():
        expected = model(**inputs, use_cache=False).logits
    for rank, found in enumerate(both[name]):
        for back_end in ("sdpa", "eager", "flex_attention"):
            close(found[back_end][real], expected[real], f"{back_end}, rank {rank}")


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_every_form_of_a_mask_has_the_heads_of_its_rank(both, name):
    model = build(name)
    inputs, real = inputs_for(model.config), MASK.bool()
    own = model(inputs["input_ids"], own_mask_for(model.config), use_cache=False).logits
    plain = model(**inputs, use_cache=False).logits
    for found in both[name]:
        for back_end in ("sdpa", "eager"):
            close(found[f"own mask, {back_end}"], own, back_end)
        close(found["blocks"][real], plain[real], "in blocks")
        # FSDP's shards are no heads.
        close(found["fsdp"][real], plain[real], "fully sharded")


@pytest.mark.parametrize("name", ["alibi", "prefix-alibi"])
@torch.no_grad()
def test_folded_alibi_has_the_slopes_of_its_rank(both, name):
    model = build(name).bfloat16()
    inputs = inputs_for(model.config)
    with tuned("folding_devices", ("cpu",)):
        expected = model(inputs["input_ids"], use_cache=False).logits
    for found in both[name]:
        # Sums over the halves of the heads are rounded once more.
        assert (found["folded"] - expected).abs().max() <= 0.03 * expected.abs().max()


@pytest.mark.parametrize("name", MODELS)
def test_generated_tokens_equal_those_of_one_process(both, name):
    model = build(name)
    inputs = {key: value for key, value in inputs_for(model.config).items() if key in ("input_ids", "attention_mask")}
    expected = model.generate(**inputs, max_new_tokens=6, do_sample=False, eos_token_id=-1)
    for found in both[name]:
        assert torch.equal(found["generated"], expected)


@pytest.mark.parametrize("name", MODELS)
def test_gradients_equal_those_of_one_process(both, name):
    model = build(name)
    model(**inputs_for(model.config), use_cache=False).logits.square().sum().backward()
    largest = max(parameter.grad.abs().max() for parameter in model.parameters())
    for found in both[name]:
        for parameter_name, parameter in model.named_parameters():
            difference = (found["gradients"][parameter_name] - parameter.grad).abs().max()
            assert difference <= 1e-5 * largest, parameter_name


@pytest.mark.parametrize("name", MODELS)
def test_the_saved_folder_is_whole_again(launched, name):
    saved = AutoModelForCausalLM.from_pretrained(launched[0] / name / "saved").state_dict()
    expected = build(name).state_dict()
    assert saved.keys() == expected.keys()
    for key, weight in expected.items():
        assert torch.equal(saved[key], weight), key


def test_a_head_that_cannot_be_cut_is_not_computed_wrongly(both):
    for told in both["mqa"]:
        assert "is invalid for input of size" in told


@pytest.mark.parametrize("name", MODELS)
def test_the_projections_are_really_cut(both, name):
    model = build(name)
    expected = {
        parameter
        for parameter, _ in model.named_parameters()
        if ".layers." in parameter and parameter.endswith(".weight") and "_proj" in parameter
    }
    for found in both[name]:
        assert expected <= set(found["cut"])
        assert found["local"] == model.config.num_attention_heads * model.config.head_dim // 2


def test_the_plan_is_that_of_llama():
    """The same styles for the modules that both have."""
    sizes = {name: value for name, value in SIZES.items() if name in LlamaConfig.__dataclass_fields__}
    stock = make_loud(LlamaForCausalLM(LlamaConfig(**sizes)))
    assert build("rope").tp_plan == stock.tp_plan
