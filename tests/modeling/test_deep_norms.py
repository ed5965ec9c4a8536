"""GLM-130B's choices for stability by hand (DeepNorm, shrunk embedding gradient, GeGLU), and deep models at step 0.

DeepNet (arXiv 2203.00555) explains why post-norm models fail by the size of their first updates (section 3).
"""

import importlib.util
import itertools
import json
import math
from pathlib import Path

import pytest
import torch
import typer
from cli_cases import write_corpus
from matrix_cases import tiny_config
from typer.testing import CliRunner

from minillm import MiniLLMConfig, MiniLLMForCausalLM, MiniLLMModel
from minillm.feed_forward import MiniLLMGLU
from minillm.training import DataCollatorForCausalLM

SCRIPT = Path(__file__).parents[2] / "examples" / "deep_norms.py"
LAYERS = 48


@pytest.fixture(scope="module")
def example():
    spec = importlib.util.spec_from_file_location("deep_norms", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# --- the settings ---


@pytest.mark.parametrize(
    ("layers", "alpha", "beta"),
    [(2, 2**0.5, 0.5), (8, 2.0, 8**-0.5), (32, 8**0.5, 0.25), (128, 4.0, 32**-0.5), (2048, 8.0, 128**-0.5)],
)
def test_deepnorm_factors_of_a_decoder(layers, alpha, beta):
    """Figure 2 of the paper: alpha (2 N) ** (1/4), beta (8 N) ** (-1/4), here as square roots."""
    config = MiniLLMConfig(norm_placement="deepnorm", num_hidden_layers=layers)
    assert config.deepnorm_alpha == pytest.approx(alpha, rel=1e-12)
    assert config.deepnorm_beta == pytest.approx(beta, rel=1e-12)


@pytest.mark.parametrize(
    ("placement", "expected"),
    [("deepnorm", [3, -1, -1, -1]), ("post", [5, -3, -1, -1])],
)
def test_the_wiring_of_a_block_by_hand(placement, expected):
    """Eight layers: alpha is 2. The stream (1, 1, -1, -1) is its own norm; the feed-forward adds (4, -4, 0, 0)."""
    config = MiniLLMConfig(
        norm_placement=placement,
        norm_type="layernorm",
        norm_eps=1e-12,
        mlp_bias=True,
        hidden_size=4,
        intermediate_size=4,
        num_attention_heads=1,
        num_hidden_layers=8,
        vocab_size=4,
    )
    model = MiniLLMModel(config)
    layer = model.layers[5]
    with torch.no_grad():
        layer.self_attn.o_proj.weight.zero_()
        layer.mlp.down_proj.weight.zero_()
        layer.mlp.down_proj.bias.copy_(torch.tensor([4.0, -4.0, 0.0, 0.0]))
        stream = torch.tensor([1.0, 1.0, -1.0, -1.0])
        got = layer.wiring(layer, stream, lambda h: layer.self_attn.o_proj(h))
    expected = torch.tensor(expected, dtype=torch.float32)
    torch.testing.assert_close(got, expected / expected.square().mean().sqrt(), rtol=0, atol=1e-5)


def test_geglu_by_hand():
    """gelu(1) is the normal distribution function at 1, 0.8413; times 3 and then 2."""
    layer = MiniLLMGLU(tiny_config(hidden_act="gelu", hidden_size=4, num_attention_heads=1, intermediate_size=1))
    with torch.no_grad():
        layer.gate_proj.weight.copy_(torch.tensor([[0.5, 0.0, 0.0, 0.0]]))
        layer.up_proj.weight.copy_(torch.tensor([[0.0, 3.0, 0.0, 0.0]]))
        layer.down_proj.weight.copy_(torch.tensor([[0.0], [0.0], [2.0], [0.0]]))
        got = layer(torch.tensor([2.0, 1.0, 7.0, 7.0]))
    torch.testing.assert_close(got, torch.tensor([0.0, 0.0, 6 * 0.8413447, 0.0]), rtol=0, atol=1e-5)


def test_a_gated_feed_forward_is_eight_thirds_wide():
    """As many weights as the plain one of four times the width: 3 * 8/3 = 2 * 4."""
    for width in (96, 768, 12288):
        glu, plain = (
            MiniLLMConfig(hidden_size=width, num_attention_heads=2, mlp_type=kind) for kind in ("glu", "mlp")
        )
        assert 3 * glu.intermediate_size == 8 * width and 3 * glu.intermediate_size == 2 * plain.intermediate_size
    # Widths between are rounded up to a multiple of 256.
    assert MiniLLMConfig(hidden_size=128).intermediate_size == 512


def test_glm_130b_has_these_settings():
    config = MiniLLMConfig.from_preset("glm-130b")
    assert (config.norm_placement, config.norm_type, config.hidden_act) == ("deepnorm", "layernorm", "gelu")
    assert (config.mlp_type, config.embedding_gradient_scale) == ("glu", 0.1)
    assert 3 * config.intermediate_size == 8 * config.hidden_size
    # It takes square roots of 2 N where DeepNet takes fourth roots of 2 N and 8 N.
    assert config.deepnorm_alpha == pytest.approx(140**0.5) and config.deepnorm_beta == pytest.approx(140**-0.5)


def test_the_shrunk_embedding_gradient_by_hand():
    """GLM-130B (arXiv 2210.02414, section 3): e * alpha + e.detach() * (1 - alpha), with the weights as drawn."""
    models = []
    for scale in (1.0, 0.1):
        torch.manual_seed(0)
        models.append(MiniLLMForCausalLM(tiny_config(embedding_gradient_scale=scale)).train())
    plain, shrunk = models
    for name, weight in plain.named_parameters():
        assert torch.equal(weight, shrunk.get_parameter(name)), name
    tokens = torch.tensor([[3, 1, 4, 1, 5]])
    table = plain.model.embed_tokens.weight
    embedded = table[tokens]
    plain(inputs_embeds=embedded * 0.1 + embedded.detach() * 0.9, labels=tokens).loss.backward()
    shrunk(tokens, labels=tokens).loss.backward()
    torch.testing.assert_close(shrunk.model.embed_tokens.weight.grad, table.grad, rtol=1e-5, atol=1e-9)


# --- a deep model at its start ---


def deep_model(placement, layers=LAYERS, width=256, **fields):
    """Square maps whose weights have deviation width ** -0.5: each keeps the size of what it maps (DeepNorm: beta)."""
    config = MiniLLMConfig(
        norm_placement=placement,
        norm_type="layernorm",
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=2,
        initializer_range=width**-0.5,
        vocab_size=64,
        **{"intermediate_size": width, **fields},
    )
    return MiniLLMForCausalLM(config).train()


def moments(function, variance):
    """Means of function(z) ** 2 and of its derivative's square, z normal with this variance, by a sum."""
    z = torch.linspace(-8, 8, 4001, dtype=torch.float64, requires_grad=True)
    weight = torch.exp(-(z.detach() ** 2) / 2)
    values = function(variance**0.5 * z)
    slopes = torch.autograd.grad(values.sum(), z)[0] / variance**0.5
    return ((weight * sample.detach() ** 2).sum() / weight.sum() for sample in (values, slopes))


# Feed-forward and inner width, and what 48 layers of post-norm multiply a gradient by.
FEED_FORWARDS = {
    "bilinear": ({"hidden_act": "bilinear", "intermediate_size": 384}, 16834),  # 1.5 ** 24
    "geglu": ({"hidden_act": "gelu", "intermediate_size": 1024}, 50097),  # 8/3 of the width
    "mlp": ({"hidden_act": "gelu", "mlp_type": "mlp", "intermediate_size": 1536}, 2.91),
}


@pytest.mark.parametrize("feed_forward", FEED_FORWARDS)
@pytest.mark.parametrize("placement", ["post", "deepnorm"])
def test_how_the_gradient_grows_from_the_top_layer_to_the_lowest(placement, feed_forward):
    """`norm(alpha h + f(h))` multiplies the mean square of a gradient by (alpha**2 + g) / (alpha**2 + v), where v is
    the mean square of f(h) and g that of its derivative. A linear map has g = v, and attention to a single token is
    one. The derivative of a product has two terms, so g = 2 v with bilinear gates: where v = 1, post-norm's 48 layers
    multiply the gradient by 1.5 ** 24; DeepNorm's hardly.
    """
    seed = 0
    print(f"seed {seed}")
    torch.manual_seed(seed)
    fields, by_hand = FEED_FORWARDS[feed_forward]
    width, inner, deep = 384, fields["intermediate_size"], placement == "deepnorm"
    model = deep_model(placement, width=width, **fields)
    # As large as what leaves a norm.
    stream = torch.randn(32, 1, width, requires_grad=True)
    states = model.model(inputs_embeds=stream, use_cache=False, output_hidden_states=True).hidden_states
    gradients = torch.autograd.grad((states[-1] * torch.randn_like(states[-1])).sum(), (states[0], states[-1]))
    measured = (gradients[0].norm() / gradients[1].norm()).item()

    alpha_squared = (2 * LAYERS) ** 0.5 if deep else 1.0
    variance = 2 / (width + inner) * (8 * LAYERS) ** -0.5 if deep else 1 / width
    into, back = width * variance, inner * variance  # what maps in and out multiply a mean square by
    value, slope = (into, 1.0) if feed_forward == "bilinear" else moments(torch.nn.functional.gelu, into)
    if feed_forward == "mlp":
        v, g = back * value, back * into * slope
    else:
        v, g = back * into * value, back * into * (value + into * slope)
    expected = float(((alpha_squared + g) / (alpha_squared + v)) ** (LAYERS / 2))
    assert expected == pytest.approx(1.0 if deep else by_hand, rel=5e-3)
    # Widths are finite: every layer's factor is a little off.
    assert measured == pytest.approx(expected, rel=0.03 if deep else 0.3)


def first_update(placement, layers, seed):
    """How far one step of Adam moves the model's output, ||F(x, theta_1) - F(x, theta_0)|| / ||F(x, theta_0)||."""
    torch.manual_seed(seed)
    model = deep_model(placement, layers, width=32, intermediate_size=85, hidden_act="gelu")
    tokens = torch.randint(0, 64, (4, 32))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-5)
    before = model.model(tokens, use_cache=False).last_hidden_state.detach()
    model(tokens, labels=tokens).loss.backward()
    optimizer.step()
    after = model.model(tokens, use_cache=False).last_hidden_state.detach()
    return ((after - before).norm() / before.norm()).item()


def test_the_first_update_of_a_deep_model():
    """DeepNet's measure, section 3: after one tiny step a deep post-norm model computes something unrelated, at the
    distance sqrt(2) of two normalised vectors that have nothing in common; DeepNorm's output hardly moves."""
    seed = 0
    print(f"seed {seed}")
    post = {layers: first_update("post", layers, seed) for layers in (6, LAYERS)}
    deepnorm = {layers: first_update("deepnorm", layers, seed) for layers in (6, LAYERS)}
    assert post[LAYERS] == pytest.approx(2**0.5, abs=0.15)
    assert deepnorm[LAYERS] < 0.003
    # It is the depth that does it.
    assert post[6] < 0.02 and deepnorm[6] < 0.001


@pytest.mark.parametrize(
    ("placement", "fields", "least", "most"),
    [("post", {}, 0.5, 1.0), ("post", {"mlp_type": "mlp"}, 0.95, 1.0), ("deepnorm", {}, -0.05, 0.05)],
    ids=["post", "post-mlp", "deepnorm"],
)
def test_whether_tokens_become_alike(placement, fields, least, most):
    """Attention of fresh weights is nearly a mean over the tokens before (arXiv 2103.03404 on what that leads to):
    under post-norm it weighs as much as the token's own stream in each layer. The mean cosine of pairs of tokens."""
    seed = 0
    print(f"seed {seed}")
    torch.manual_seed(seed)
    model = deep_model(placement, width=48, hidden_act="gelu", intermediate_size=128, **fields)
    with torch.no_grad():
        tokens = torch.randint(0, 64, (4, 64))
        states = model.model(tokens, use_cache=False, output_hidden_states=True).hidden_states
    first, last = (torch.nn.functional.normalize(states[place], dim=-1) for place in (0, -1))
    apart = ~torch.eye(64, dtype=torch.bool)
    cosines = [(h @ h.transpose(1, 2))[:, apart].mean().item() for h in (first, last)]
    assert abs(cosines[0]) < 0.05 and least < cosines[1] <= most


# --- the example ---


def run_script(example, *arguments):
    app = typer.Typer()
    app.command()(example.main)
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.mark.slow
def test_the_script_writes_its_figures_and_a_picture(example, tmp_path):
    corpus = write_corpus(tmp_path / "corpus", files=20)
    sizes = ("--steps", 6, "--layers", 2, "--hidden-size", 16, "--length", 32, "--seeds", 2)
    names = ["post-mlp", "deepnorm", "pre-small"]
    out = tmp_path / "out"
    done = run_script(example, "--corpus", corpus, *sizes, "--variants", ",".join(names), "--out", out)
    assert done.exit_code == 0, (done.output, done.exception)
    assert sorted(path.name for path in out.iterdir()) == ["losses.json", "losses.png"]
    assert (out / "losses.png").read_bytes().startswith(b"\x89PNG") and (out / "losses.png").stat().st_size < 100_000
    report = json.loads((out / "losses.json").read_text("utf-8"))
    assert report["environment"]["torch"] == torch.__version__ and report["environment"]["threads"] == 1
    assert report["settings"]["intermediate_size"] == 42 and report["settings"]["warmup_steps"] == 0
    assert [(run["seed"], run["variant"]) for run in report["runs"]] == [(s, name) for s in (0, 1) for name in names]
    for run in report["runs"]:
        assert [entry["step"] for entry in run["log"]] == [1, 2, 3, 4, 5, 6]
        assert all(math.isfinite(entry[key]) for entry in run["log"] for key in ("loss", "grad_norm"))
    # Untrained models are near the loss of even chances, a model that counts is below.
    assert report["levels"]["bigram"] < report["levels"]["unigram"] < math.log(report["settings"]["vocab_size"])
    for name, row in report["summary"].items():
        low, high = sorted(run["held_out_loss"] for run in report["runs"] if run["variant"] == name)
        assert (row["lowest"], row["highest"]) == (low, high) and row["held_out_loss"] == pytest.approx(
            (low + high) / 2
        )
        assert f"| {name} | {row['held_out_loss']:.2f} | {low:.2f} to {high:.2f} |" in done.output


@pytest.mark.slow
def test_all_variants_get_the_same_rows_in_the_same_order(example, tmp_path):
    collator = DataCollatorForCausalLM(max_length=8, pad_token_id=0)
    rows = [{"input_ids": list(range(n, n + 8)), "labels": list(range(n, n + 8))} for n in range(1, 9)]
    seen, logs = {}, {}
    for name, seed in (("post", 0), ("deepnorm", 0), ("deepnorm", 1), ("sandwich", 1), ("again", 1)):
        batches = seen[name, seed] = []

        def recording(samples, batches=batches):
            batches.append([sample["input_ids"][0] for sample in samples])
            return collator(samples)

        config = tiny_config(norm_placement="sandwich" if name == "again" else name)
        schedule = {"max_steps": 4, "learning_rate": 1e-3, "logging_steps": 1, "output_dir": str(tmp_path)}
        _, logs[name, seed] = example.train(config, rows, recording, seed, **schedule)
    assert len(seen["post", 0]) == 4 and sorted(itertools.chain(*seen["post", 0][:2])) == list(range(1, 9))
    assert seen["post", 0] == seen["deepnorm", 0] != seen["deepnorm", 1] == seen["sandwich", 1]
    assert logs["again", 1] == logs["sandwich", 1] != logs["deepnorm", 1]


def test_the_script_refuses_a_variant_that_it_does_not_have(example, tmp_path):
    done = run_script(example, "--variants", "deepnorm,best", "--out", tmp_path / "out")
    assert done.exit_code == 2 and "deepnorm,best" in done.output and "post-small" in done.output
    assert not (tmp_path / "out").exists()
