"""The benchmarks run, in small, in every kind; and their figures are what they say they are."""

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from torch.profiler import ProfilerActivity, profile

from benchmarks import growth, memory, models, packing, speed, startup, steps
from benchmarks.__main__ import KINDS, parse
from benchmarks.models import VARIANTS, Contender, Shape, build, config_of
from benchmarks.pictures import draw
from benchmarks.report import MARKED, amount, fill_page, markdown
from benchmarks.steps import attention_layer, batches_of, copying, decoding, training_step
from benchmarks.timing import Comparison, Options, Stopwatch, bootstrap_interval, compare, interleave, summarise
from benchmarks.training_worker import TOY, run_case
from minillm import MiniLLMConfig

ROOT = Path(__file__).parents[2]
SMALL = Shape(64, 32, 2, 4, 16)
PICTURES = {
    "speed": ["speed-attention-layer.png", "speed-decoding.png", "speed-first-token.png", "speed-training-step.png"],
    "memory": ["memory.png"],
    "growth": ["growth-length.png"],
    "packing": ["packing.png"],
    "blocks": ["blocks.png"],
    "startup": ["startup.png"],
    "tokenizer": ["tokenizer.png"],
    "collators": ["collators.png"],
    "conversion": [],
    "train": ["train.png"],
}


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> tuple[Path, str]:
    """What one command leaves and prints."""
    out = tmp_path_factory.mktemp("results")
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks", "all", "--tiny", "--steps", "1", "--out", str(out)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return out, done.stdout


@pytest.mark.thorough
@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_kind_leaves_figures_tables_and_pictures(run, kind):
    out, printed = run
    result = json.loads((out / f"{kind}.json").read_text("utf-8"))
    assert result["kind"] == kind and result["rows"] and result["not_measured"] == []
    facts = result["environment"]
    assert facts["torch"] == torch.__version__ and facts["transformers"] == transformers.__version__
    assert facts["threads"] == 1 and facts["steps"] == 1 and facts["tiny"] is True
    for row in result["rows"] + result["comparisons"]:
        assert row["median"] > 0 and row["rounds"] >= 1
        assert row["spread"][0] <= row["median"] <= row["spread"][1]
        if kind != "growth":
            assert row["interval"][0] <= row["median"] <= row["interval"][1]
    table = markdown(kind, result)
    assert table == (out / f"{kind}.md").read_text("utf-8")
    assert f"## {kind}\n\n{table}" in printed
    for name in PICTURES[kind]:
        assert (out / name).read_bytes().startswith(b"\x89PNG") and (out / name).stat().st_size < 80_000


@pytest.mark.thorough
@pytest.mark.slow
def test_there_are_no_other_pictures(run):
    names = sorted(path.name for path in run[0].glob("*.png"))
    assert names == sorted(name for kind in PICTURES.values() for name in kind)


def test_all_rivals_are_in_the_same_run(run):
    rows = json.loads((run[0] / "speed.json").read_text("utf-8"))["rows"]
    training = {row["contender"] for row in rows if row["what"].startswith("training")}
    assert training == {"Llama", "GLM", "Bloom", "MPT", "Falcon", "Mixtral", *VARIANTS}


def test_a_large_vocabulary_takes_a_third_of_the_memory(run):
    comparisons = json.loads((run[0] / "memory.json").read_text("utf-8"))["comparisons"]
    # 8 x 128 tokens and 65,536 entries: one float32 copy of the logits is 268 MB.
    assert len(comparisons) == 1 and comparisons[0]["median"] < 1 / 3 and comparisons[0]["met"] is True


def test_memory_is_that_of_the_step_alone(run):
    rows = json.loads((run[0] / "memory.json").read_text("utf-8"))["rows"]
    llama = next(row for row in rows if row["contender"] == "Llama" and row["unit"] == "B")
    # Logits, their logarithmic softmax and the gradient; beside them the activations of so small a model are nothing.
    assert 3 * 268e6 <= llama["median"] < 3.3 * 268e6


@pytest.mark.parametrize(
    ("name", "class_name"),
    [
        ("Llama", "LlamaForCausalLM"),
        ("GLM", "GlmForCausalLM"),
        ("Bloom", "BloomForCausalLM"),
        ("MPT", "MptForCausalLM"),
        ("Falcon", "FalconForCausalLM"),
        ("Mixtral", "MixtralForCausalLM"),
    ],
)
def test_a_rival_is_of_its_class_and_shape(name, class_name):
    model = build(Contender(name), SMALL, "cpu")
    assert type(model) is getattr(transformers, class_name)
    config = model.config
    sizes = (config.vocab_size, config.hidden_size, config.num_hidden_layers, config.num_attention_heads)
    assert sizes == SMALL[:4]
    assert config.tie_word_embeddings and model.lm_head.weight is model.get_input_embeddings().weight
    assert getattr(config, "num_key_value_heads", 4) == 4
    assert config.use_cache
    assert name != "Falcon" or (config.alibi and config.num_kv_heads == 4)


@pytest.mark.parametrize(("own", "rival"), [("MiniLLM causal", "Llama"), ("MiniLLM moe", "Mixtral")])
def test_twins_have_equally_many_parameters(own, rival):
    counts = {build(Contender(name), speed.PRESET, "cpu").num_parameters() for name in (own, rival)}
    assert len(counts) == 1


@pytest.mark.parametrize("kind", ["causal", "prefix", "alibi"])
def test_the_variants_are_the_presets(kind):
    preset = MiniLLMConfig.from_preset(f"minillm-{kind}-10m")
    fields = config_of(f"MiniLLM {kind}", speed.PRESET).to_diff_dict(), preset.to_diff_dict()
    # All but which of them were filled in.
    assert {**fields[0], "derived_fields": None} == {**fields[1], "derived_fields": None}


def test_the_checkpoint_to_load_has_a_gigabyte():
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config_of("Llama", startup.SHAPES["full"]))
    assert 1.0e9 < 4 * model.num_parameters() < 1.1e9


def test_an_interval_is_between_order_statistics_around_the_median():
    sample = [9.0, 1.0, 5.0, 3.0, 7.0, 8.0, 2.0, 4.0, 6.0]
    low, high = bootstrap_interval(sample)
    assert low < 5.0 < high
    # The median of nine draws is k or less with the probability that five or more draws are.
    draws = np.random.default_rng(1).choice(sample, (20000, 9))
    assert np.mean(np.median(draws, axis=1) < low) <= 0.025 < np.mean(np.median(draws, axis=1) <= low)
    assert summarise(sample)["median"] == 5.0 and summarise(sample)["spread"] == [1.0, 9.0]
    assert bootstrap_interval([2.5]) == (2.5, 2.5)


def test_a_ratio_is_the_median_of_ratios_within_rounds():
    # The machine slows down fourfold; within each round the contender needs half the time, once a third.
    values = {"own": [1.0, 2.0, 4.0], "slow": [9.0, 9.0, 9.0], "rival": [2.0, 6.0, 8.0]}
    [row] = compare("x", values, Comparison(("slow", "own"), "rival", at_least=2.0))
    assert (row["contender"], row["median"], row["spread"], row["met"]) == ("own", 2.0, [2.0, 3.0], True)
    [row] = compare("x", values, Comparison("own", "rival", at_most=0.4), "time")
    assert (row["median"], row["met"]) == (0.5, False)
    assert compare("x", {"own": [], "rival": [1.0]}, Comparison("own", "rival")) == []


def test_rounds_are_interleaved_and_warm():
    calls = []
    runs = {name: lambda name=name: calls.append(name) for name in "abc"}
    times = interleave(runs, Stopwatch(), Options(steps=6))
    rounds = ["".join(calls[start : start + 3]) for start in range(0, len(calls), 3)]
    assert len(rounds) == 7 and all(sorted(order) == list("abc") for order in rounds)
    assert {order[0] for order in rounds[1:]} == set("abc") and len(set(rounds[1:])) > 3
    assert all(len(values) == 6 for values in times.values())


def test_a_contender_without_memory_is_left_out():
    def fails():
        raise torch.OutOfMemoryError

    times = interleave({"a": fails, "b": lambda: None}, Stopwatch(), Options(steps=2))
    assert times["a"] == [] and len(times["b"]) == 2


@pytest.mark.slow
def test_a_contender_that_cannot_be_made_ready_is_named(monkeypatch):
    def build_all_but_some(contender, *others):
        if contender.model in ("Bloom", "MiniLLM alibi"):
            raise torch.OutOfMemoryError
        return build(contender, *others)

    monkeypatch.setattr(steps, "build", build_all_but_some)
    for kind, row_of in ((speed, "Bloom"), (packing, "MiniLLM alibi, padded")):
        monkeypatch.setattr(kind, "build", build_all_but_some)
        result = kind.measure(Options(steps=1, tiny=True))
        assert {row["reason"] for row in result["not_measured"]} == {"the device's memory did not suffice"}
        assert row_of in {row["contender"] for row in result["not_measured"]}
        assert result["rows"] and row_of not in {row["contender"] for row in result["rows"]}


@pytest.mark.parametrize("fails", ["the time", "the memory"])
def test_memory_is_compared_where_a_later_repeat_fails(fails, monkeypatch):
    case = memory.PLANS["tiny"][0]._replace(repeats=2)
    monkeypatch.setattr(memory, "PLANS", {"tiny": (case,)})
    calls = []

    def run(cases, *options):
        calls.append(cases[0].contender.name)
        there = fails == "the time" or len(calls) != 4
        return [{"start": 0, "before": 1, "peak": 10, "seconds": [1.0]} if there else None]

    monkeypatch.setattr(memory, "run_cases", run)
    options = Options(steps=2, tiny=True, minutes=1.0)
    monkeypatch.setattr(Options, "out_of_time", lambda self: fails == "the time" and len(calls) >= 2)
    result = memory.measure(options)
    if fails == "the time":
        assert calls == ["Llama", "MiniLLM causal"]
        assert len(result["comparisons"]) == 1 and result["not_measured"] == []
    else:
        assert result["comparisons"] == []
        assert [row["contender"] for row in result["not_measured"]] == ["MiniLLM causal"]


def test_what_is_compiled_runs_compiled_or_not_at_all(monkeypatch):
    monkeypatch.setattr(models, "COMPILE_BACKEND", "eager")
    models.start_afresh()

    def step(length):
        ids = iter([torch.randint(3, 64, (1, length))])
        training_step(build(Contender("Llama", compiled=True), SMALL, "cpu"), batches_of("Llama", ids))()

    with pytest.raises(torch._dynamo.exc.FailOnRecompileLimitHit):
        for length in range(8, 32):
            step(length)
    models.start_afresh()
    step(31)
    models.start_afresh()


def test_the_warm_up_is_wide_enough_for_flex_attention():
    assert TOY.hidden_size // TOY.num_attention_heads >= 16


def test_what_there_is_no_time_for_is_named():
    result = speed.measure(Options(steps=1, tiny=True, minutes=0.0))
    assert result["rows"] == [] and {row["reason"] for row in result["not_measured"]} == {"no time was left"}
    assert "training step, 2 x 32 tokens" in markdown("speed", result)
    assert growth.measure(Options(steps=1, tiny=True, minutes=0.0))["rows"] == []


def test_the_prompt_is_not_timed_and_the_cache_is_as_asked():
    model = build(Contender("MiniLLM alibi"), SMALL, "cpu")
    seen = []
    model.register_forward_hook(
        lambda module, args, kwargs, output: seen.append((args, kwargs, output)), with_kwargs=True
    )
    stopwatch = Stopwatch()
    stopwatch.begin = None
    decoding(model, iter([torch.randint(3, 64, (2, 8))]), 5, "static", stopwatch)()
    assert stopwatch.begin is not None and len(seen) == 5
    assert type(seen[-1][2].past_key_values if "past_key_values" in seen[-1][2] else seen[-1][2].cache) is (
        transformers.StaticCache
    )


@pytest.mark.parametrize("name", ["Llama", "Bloom", "MPT", "Falcon", "MiniLLM prefix", "MiniLLM alibi"])
def test_an_attention_layer_gets_what_its_model_gives_it(name):
    step = attention_layer(Contender(name), SMALL, iter([torch.randint(3, 64, (2, 16))]), "cpu")
    step()
    states = step.__closure__[step.__code__.co_freevars.index("states")].cell_contents
    gradients = [next(states).grad for _ in range(4)]
    assert sum(gradient is not None and bool(gradient.abs().sum() > 0) for gradient in gradients) == 1


@pytest.mark.thorough
@pytest.mark.slow
def test_the_plans_for_cuda_run_on_cpu(monkeypatch):
    """With SDPA in place of flex attention, which has no backward pass on CPU, and compiled without a compiler."""
    from_config, compile_module, compiled = models.AutoModelForCausalLM.from_config, torch.nn.Module.compile, []

    def with_sdpa(config, attn_implementation=None, **options):
        return from_config(config, **options, attn_implementation=attn_implementation and "sdpa")

    def compile_and_tell(module, **options):
        compiled.append(options)
        compile_module(module, **options)

    monkeypatch.setattr(models, "COMPILE_BACKEND", "eager")
    monkeypatch.setattr(models.AutoModelForCausalLM, "from_config", with_sdpa)
    monkeypatch.setattr(torch.nn.Module, "compile", compile_and_tell)
    plan = speed.PLANS["cuda"]
    heads = {heads // 8: groups for heads, groups in plan.attention.items()}
    small = replace(plan, shape=SMALL, lengths=(16,), tokens=32, new=3, attention=heads)
    result = speed.measure(Options(steps=1), small)
    assert result["not_measured"] == []
    kinds = (plan.training, plan.prompts, *plan.decoding.values(), *plan.attention.values())
    assert len(result["comparisons"]) == sum(len(group.comparisons) for kind in kinds for group in kind)
    # Two blocks of each of eight contenders.
    assert compiled == [{"backend": "eager", "dynamic": False}] * 16

    # Where attention was chosen, and compilation, above.
    def in_this_process(cases, *options):
        models.start_afresh()
        return [{"start": 0, **run_case(cases[0], *options)}]

    monkeypatch.setattr(memory, "run_cases", in_this_process)
    for kind, sizes in (
        (memory, [case._replace(shape=SMALL, rows=2, length=16) for case in memory.PLANS["cuda"]]),
        (packing, packing.PLANS["cuda"]._replace(shape=SMALL, tokens=32)),
    ):
        monkeypatch.setattr(kind, "PLANS", {"cpu": sizes})
        result = kind.measure(Options(steps=1))
        assert result["not_measured"] == []
        assert result["rows"] and result["comparisons"]


def test_on_cuda_the_same_kinds_have_larger_shapes():
    for plans in (speed.PLANS, memory.PLANS, growth.PLANS, packing.PLANS):
        assert set(plans) == {"cpu", "cuda", "tiny"}
    shape = speed.PLANS["cuda"].shape
    assert shape[:4] == (32000, 2048, 16, 16)
    assert speed.PLANS["cuda"].lengths == (2048, 8192) and list(speed.PLANS["cuda"].decoding) == [1, 16]
    meta = build(Contender("Llama"), shape, "meta", torch.bfloat16)
    assert 0.94e9 < meta.num_parameters() < 0.96e9
    assert build(Contender("Llama"), memory.BILLION, "meta", torch.bfloat16).num_parameters() == meta.num_parameters()


def test_packed_and_padded_are_the_same_documents():
    plan = packing.PLANS["tiny"]
    lengths = packing.document_lengths(plan)
    assert len(lengths) > 2 and 0 < sum(lengths) <= plan.tokens and max(lengths) <= plan.shape.length
    for name in ("MiniLLM causal", "MiniLLM prefix", "Llama"):
        packed, padded = (packing.collate(plan, name, way, lengths, 3) for way in packing.WAYS)
        assert padded["input_ids"].shape == (len(lengths), max(lengths))
        assert packed["input_ids"].shape[0] < len(lengths)
        # Ids at padding are 0, those of documents are not.
        same = [sorted(batch["input_ids"][batch["input_ids"] > 0].tolist()) for batch in (packed, padded)]
        assert same[0] == same[1] and len(same[0]) == sum(lengths)
        scored = [int((batch["labels"] != -100).sum()) for batch in (packed, padded)]
        assert scored[0] == scored[1] > 0
        assert (
            set(packed)
            == {
                "MiniLLM causal": {"input_ids", "attention_mask", "labels", "document_ids", "position_ids"},
                "MiniLLM prefix": {
                    "input_ids",
                    "attention_mask",
                    "labels",
                    "document_ids",
                    "position_ids",
                    "prefix_mask",
                },
                "Llama": {"input_ids", "labels", "position_ids"},
            }[name]
        )


@torch.no_grad()
def test_the_rival_reads_packed_documents_apart():
    """Llama's packed logits are those of its padded documents: it is a rival that does the same work."""
    plan = packing.PLANS["tiny"]
    lengths = packing.document_lengths(plan)
    model = build(Contender("Llama"), plan.shape, "cpu").eval()
    losses = []
    for way in packing.WAYS:
        losses.append(model(**packing.collate(plan, "Llama", way, lengths, 3), use_cache=False).loss)
    torch.testing.assert_close(*losses)


def test_copies_are_of_what_a_token_has_read(monkeypatch):
    monkeypatch.setattr(steps, "LARGEST_CACHE", 2**20)
    for tied in (True, False):
        shape = SMALL._replace(tie_word_embeddings=tied)
        model = build(Contender("MiniLLM causal"), shape, "cpu")
        run = copying(Contender("MiniLLM causal"), shape, "cpu", 3)
        with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as seen:
            run()
        copies = [event.input_shapes[0] for event in seen.events() if event.name == "aten::copy_"]
        weights = model.num_parameters() - (0 if tied else model.get_input_embeddings().weight.numel())
        # Untied, only a row of the embedding is read; each number copied is read and written.
        assert copies == [[weights // 2]] * 3


def test_wrong_arguments_are_refused(capsys):
    for arguments, told in ((["--steps", "0"], "at least 1"), (["speeed"], "invalid choice: 'speeed'")):
        with pytest.raises(SystemExit):
            parse(arguments)
        assert told in capsys.readouterr().err


def test_amounts_are_readable():
    assert [amount(value, "s") for value in (12.345, 0.0123, 2e-5)] == ["12.3 s", "12.3 ms", "20.0 µs"]
    assert [amount(value, "B") for value in (12.9e9, 473e6, 0)] == ["12.9 GB", "473 MB", "0 B"]


def test_the_page_shows_the_committed_results():
    page = (ROOT / "docs" / "performance.md").read_text("utf-8")
    shown = MARKED.findall(page)
    assert {kind for kind, _ in shown} == set(KINDS)
    for kind, tables in shown:
        result = json.loads((ROOT / "benchmarks" / "results" / f"{kind}.json").read_text("utf-8"))
        assert result["environment"]["tiny"] is False
        assert tables == markdown(kind, result, brief=True), "python -m benchmarks.report writes them"
    pictures = re.findall(r"\((\.\./benchmarks/results/[\w-]+\.png)\)", page)
    assert pictures and all((ROOT / "docs" / name).stat().st_size < 80_000 for name in pictures)


def test_a_page_is_filled_with_tables(run, tmp_path):
    page = tmp_path / "page.md"
    page.write_text("a\n<!-- results: startup -->\nold\n<!-- end -->\nb", "utf-8")
    fill_page(page, run[0])
    table = (run[0] / "startup.md").read_text("utf-8")
    assert page.read_text("utf-8") == f"a\n<!-- results: startup -->\n{table}<!-- end -->\nb"


@pytest.mark.gpu
def test_every_kind_runs_on_cuda(tmp_path):
    for kind in KINDS:
        result = KINDS[kind](Options(steps=1, device="cuda", tiny=True))
        assert result["rows"]
        draw(tmp_path, kind, result)
