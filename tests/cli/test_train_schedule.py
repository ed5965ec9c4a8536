"""How `minillm train` trains: the learning rates, the decay, the clipping and the optimizer that its steps really use.

A callback notes what the optimizer holds at each step; the expected numbers are worked out by hand.
"""

import functools
import json
import math

import pytest
import torch
from cli_cases import assert_same_weights, save_small_model, small_tokenizer, succeed, weights
from transformers import AutoModelForCausalLM, TrainerCallback

from minillm.cli import training_run
from minillm.configuration.presets import PRESETS, Preset

DECAY = 0.1
LAYERNORM = {
    "norm_type": "layernorm",
    "mlp_type": "mlp",
    "position_embedding_type": "learned",
    "attention_qkv_bias": True,
    "attention_out_bias": True,
    "mlp_bias": True,
    "embedding_norm": True,
    "norm_placement": "sandwich",
}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    kinds = {"causal": {}, "biases": LAYERNORM, "qk-norm": {"qk_norm": True}}
    folders = {name: save_small_model(root / name, **fields) for name, fields in kinds.items()}
    small_tokenizer().save_pretrained(root / "tokenizer")
    return folders | {"tokenizer": root / "tokenizer"}


class Notes(TrainerCallback):
    """What each step of a run used."""

    def __init__(self):
        self.rates, self.decays, self.gradients, self.norms, self.batches = [], [], [], [], []

    def on_train_begin(self, args, state, control, model, **kwargs):
        self.start = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
        # Inside of the model, where mixed precision would be on.
        linear = next(module for module in model.modules() if isinstance(module, torch.nn.Linear))
        self.hook = linear.register_forward_hook(self.note_batch)

    def note_batch(self, linear, inputs, output):
        self.batches.append((output.shape[0], output.dtype, linear.training))

    def on_pre_optimizer_step(self, args, state, control, model, optimizer, **kwargs):
        # The name that a group's parameters have in the model.
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        groups = optimizer.param_groups
        self.rates.append({group["lr"] for group in groups})
        self.decays.append({names[id(own)]: group["weight_decay"] for group in groups for own in group["params"]})
        self.gradients.append({name: own.grad.clone() for name, own in model.named_parameters() if own.requires_grad})
        self.settings = {(group["betas"], group["eps"], group["amsgrad"]) for group in groups}

    def on_log(self, args, state, control, logs, **kwargs):
        self.norms += [logs["grad_norm"]] if "grad_norm" in logs else []

    def on_train_end(self, args, state, control, model, **kwargs):
        self.hook.remove()
        self.end = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


@pytest.fixture(scope="module")
def train(corpus, tmp_path_factory):
    """Runs the command, once for the same arguments, and gives the notes of its run."""

    def run(*arguments):
        notes = Notes()
        notes.out = tmp_path_factory.mktemp("runs") / "out"
        with pytest.MonkeyPatch.context() as patch:
            stock = training_run.LogitFreeTrainer
            patch.setattr(
                training_run,
                "LogitFreeTrainer",
                lambda *given, callbacks, **named: stock(*given, callbacks=[*callbacks, notes], **named),
            )
            succeed("train", "--data", corpus, "--out", notes.out, "--batch-size", 2, *arguments)
        return notes

    return functools.cache(run)


def cosine(step, steps, peak):
    """The rate of a step, counted from 0: a twentieth of the steps up from 0, then half a cosine down to 0."""
    warmup = steps // 20
    if step < warmup:
        return peak * step / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup)))


# The arguments of some runs, which several tests read.
FAST = ("--max-steps", 20, "--learning-rate", 0.05)
ADAPTER = ("--max-steps", 20, "--lora")
ONE = ("--max-steps", 1)


@pytest.mark.mostly_thorough("warm-up of 3", "lora", "no warm-up")
@pytest.mark.parametrize(
    ("arguments", "steps", "peak"),
    [
        (("--max-steps", 62), 62, 5e-5),
        (ADAPTER, 20, 2e-3),
        (FAST, 20, 0.05),
        (("--max-steps", 19, "--lora", "--learning-rate", 0.007), 19, 7e-3),
        (ONE, 1, 5e-5),
    ],
    ids=["warm-up of 3", "lora", "own rate", "no warm-up", "one step"],
)
def test_rates_are_a_cosine_after_a_warm_up(arguments, steps, peak, models, train):
    notes = train("--model", models["causal"], *arguments)
    expected = [cosine(step, steps, peak) for step in range(steps)]
    assert [len(rates) for rates in notes.rates] == [1] * steps
    assert [rate for rates in notes.rates for rate in rates] == pytest.approx(expected, rel=1e-6, abs=1e-12)


@pytest.mark.parametrize(
    ("name", "arguments", "kinds"),
    [("causal", FAST, {1, 2}), ("biases", FAST, {1, 2}), ("qk-norm", ONE, {1, 2}), ("causal", ADAPTER, {2})],
    ids=["causal", "biases", "qk-norm", "lora"],
)
def test_matrices_decay_and_norms_and_biases_do_not(name, arguments, kinds, models, train):
    notes = train("--model", models[name], *arguments)
    decays = notes.decays[0]
    assert set(decays) == set(notes.gradients[0])
    ndim = {parameter: notes.start[parameter].ndim for parameter in decays}
    assert decays == {parameter: DECAY if ndim[parameter] == 2 else 0.0 for parameter in decays}
    assert set(ndim.values()) == kinds


def adamw(start, gradients, rates, decays):
    """Decoupled weight decay (arXiv 1711.05101) in float64, with betas of 0.9 and 0.999."""
    end = {}
    for name, value in start.items():
        value, first, second = value.double(), 0.0, 0.0
        for step, (each, rate) in enumerate(zip(gradients, rates, strict=True), 1):
            gradient = each[name].double()
            value = value * (1 - rate * decays[name])
            first, second = 0.9 * first + 0.1 * gradient, 0.999 * second + 0.001 * gradient.square()
            value = value - rate * (first / (1 - 0.9**step)) / ((second / (1 - 0.999**step)).sqrt() + 1e-8)
        end[name] = value
    return end


@pytest.mark.parametrize("name", ["causal", "biases"])
def test_steps_are_adamws_by_hand(name, models, train):
    notes = train("--model", models[name], *FAST)
    assert notes.settings == {((0.9, 0.999), 1e-8, False)}
    decays = {parameter: DECAY if value.ndim == 2 else 0.0 for parameter, value in notes.start.items()}
    rates = [cosine(step, 20, 0.05) for step in range(20)]
    for parameter, expected in adamw(notes.start, notes.gradients, rates, decays).items():
        moved = (expected - notes.start[parameter].double()).abs().max()
        # A key's bias has no gradient but rounding, of which AdamW makes steps as large as any.
        if not parameter.endswith("k_proj.bias"):
            assert moved > 0.1
        assert (notes.end[parameter].double() - expected).abs().max() <= 1e-4 * moved, parameter


def test_gradients_are_clipped_to_a_norm_of_one(models, train):
    notes = train("--model", models["causal"], *FAST)
    norms = [torch.cat([own.flatten() for own in step.values()]).norm().item() for step in notes.gradients]
    assert len(notes.norms) == 20 and max(notes.norms) > 1.5
    assert norms == pytest.approx([min(1.0, norm) for norm in notes.norms], rel=1e-4)


def test_a_step_reads_one_batch_of_the_given_size_in_float32(models, train):
    notes = train("--model", models["causal"], *FAST)
    assert notes.batches == [(2, torch.float32, True)] * 20


def test_an_adapter_has_rank_16_and_a_scaling_of_2(models, train):
    notes = train("--model", models["causal"], *ADAPTER)
    assert {tensor.shape[0] for name, tensor in notes.start.items() if "lora_A" in name} == {16}
    config = json.loads((notes.out / "adapter_config.json").read_text("utf-8"))
    assert (config["r"], config["lora_alpha"], config["lora_dropout"]) == (16, 32, 0.0)


EMBEDDING = "model.embed_tokens.weight"


def test_the_seed_decides_the_order_of_rows(models, train):
    first, other = (train("--model", models["causal"], *ONE, "--seed", seed) for seed in (7, 8))
    assert torch.equal(first.start[EMBEDDING], other.start[EMBEDDING])
    assert not torch.allclose(first.gradients[0][EMBEDDING], other.gradients[0][EMBEDDING], rtol=1e-2)


def test_the_seed_decides_the_fresh_weights(models, train, monkeypatch):
    fields = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "max_position_embeddings": 64}
    monkeypatch.setitem(PRESETS, "tiny", Preset("tiny", "made up", fields))
    arguments = ("--preset", "tiny", "--tokenizer", models["tokenizer"], *ONE)
    # Written twice, the second seed 7 is a run of its own.
    first, other, again = (train(*arguments, "--seed", 7, *more) for more in ((), ("--seed", 8), ("--seed", 7)))
    assert torch.equal(first.start[EMBEDDING], again.start[EMBEDDING])
    assert not torch.equal(first.start[EMBEDDING], other.start[EMBEDDING])
    saved = [weights(AutoModelForCausalLM.from_pretrained(run.out)) for run in (first, again)]
    assert_same_weights(*saved)
