"""`minillm demo` on a small corpus: what it leaves, and that it goes on where it was interrupted."""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from cli_cases import assert_same_weights, invoke, tree, weights, write_corpus
from matplotlib import image
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

import minillm.cli.demo as demo_module
from minillm.data import docstring_prose, load_corpus, split_corpus, tokenize_documents
from minillm.evaluation import BigramModel, UnigramModel, ngram_perplexity, perplexity
from minillm.training import DataCollatorForCausalLM, DataCollatorForPrefixLM, pack_dataset

STEPS = 24
PUBLISHED = ("causal", "prefix", "alibi", "lora")
STAGES = ("tokenizer", "baselines", *PUBLISHED, "texts")


@pytest.fixture(scope="module", autouse=True)
def small():
    """A smaller model in shorter rows, and no measuring of threads."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(demo_module.ARCHITECTURE, "hidden_size", 64)
        patch.setitem(demo_module.ARCHITECTURE, "num_hidden_layers", 2)
        patch.setattr(demo_module, "LENGTH", 64)
        patch.setattr(demo_module, "HELD_OUT_ROWS", 24)
        patch.setattr(demo_module, "fastest_thread_count", lambda run: (1, 0.0))
        yield


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("data") / "corpus", files=40)


def run_demo(out, corpus, steps=STEPS):
    return invoke("demo", "--out", out, "--corpus", corpus, "--steps", steps, "--vocab-size", 320)


@pytest.fixture(scope="module")
def finished(corpus, tmp_path_factory):
    """A whole run: its folder and what it printed."""
    out = tmp_path_factory.mktemp("finished") / "demo"
    result = run_demo(out, corpus)
    assert result.exit_code == 0, (result.output, result.exception)
    return out, result


def report_of(out):
    return json.loads((out / "report.json").read_text("utf-8"))


def test_nothing_but_the_demos_own_lines_is_printed(finished, capfd):
    out, result = finished
    assert result.stderr == ""
    for noise in ("it/s", "Warning", "Loading weights", "Writing model shards", "Traceback"):
        assert noise not in result.output
    for name in PUBLISHED:
        assert f"{name:8} ━" in result.output
    assert result.output.count("expected end: ") == 3  # The fine-tune of 6 steps ends before its estimate.
    assert f"step {STEPS}/{STEPS}" in result.output
    assert f"report: {out / 'report.md'}" in result.output


def test_report_has_the_promised_figures(finished):
    report = report_of(finished[0])
    assert set(report) == {"baselines", "variants", "lora", "settings"}
    assert set(report["variants"]) == {"causal", "prefix", "alibi"}
    figures = [report["baselines"][kind] for kind in ("unigram", "bigram")]
    figures += [report["baselines"]["prefix"][kind] for kind in ("unigram", "bigram")]
    figures += [variant["perplexity"] for variant in report["variants"].values()]
    figures += [report["lora"][f"perplexity_{when}"] for when in ("before", "after")]
    assert all(1 < figure < 320 for figure in figures)
    assert report["lora"]["perplexity_after"] < report["lora"]["perplexity_before"]
    assert report["baselines"]["bigram"] < report["baselines"]["unigram"]


def test_models_and_baselines_score_the_same_tokens(finished):
    report = report_of(finished[0])
    variants, baselines = report["variants"], report["baselines"]
    assert variants["causal"]["tokens"] == variants["alibi"]["tokens"] == baselines["tokens"]
    assert variants["prefix"]["tokens"] == baselines["prefix"]["tokens"] < baselines["tokens"]


def held_out_and_train(corpus, out, texts=lambda documents: documents):
    """Token ids of the two parts of the corpus, in the order that the demo's seed gives."""
    tokenizer = AutoTokenizer.from_pretrained(out / "tokenizer")

    def tokens(documents, rows):
        order = torch.randperm(len(documents), generator=torch.Generator().manual_seed(0)).tolist()
        samples, count = [], 0
        while order and count < rows * 64:
            samples += tokenize_documents([documents[order.pop(0)]], tokenizer)
            count += len(samples[-1]["input_ids"])
        return samples

    train, held_out = (texts(documents) for documents in split_corpus(load_corpus(corpus)))
    return tokenizer, tokens(train, STEPS * 4), tokens(held_out, 24)


@pytest.mark.parametrize("name", ["causal", "prefix", "alibi"])
def test_figures_are_those_of_the_published_models(name, finished, corpus):
    out, report = finished[0], report_of(finished[0])
    tokenizer, train, held_out = held_out_and_train(corpus, out)
    kind = DataCollatorForPrefixLM if name == "prefix" else DataCollatorForCausalLM
    collator = kind(tokenizer, max_length=64)
    rows = pack_dataset(held_out, collator)[:24]
    score = perplexity(AutoModelForCausalLM.from_pretrained(out / name), rows, collator, batch_size=1)
    told = report["variants"][name]
    assert (told["perplexity"], told["tokens"]) == (pytest.approx(score.perplexity, rel=1e-5), score.num_tokens)
    counted = [sample["input_ids"] for sample in train]
    baselines = report["baselines"]["prefix"] if name == "prefix" else report["baselines"]
    for baseline, model in (("unigram", UnigramModel), ("bigram", BigramModel)):
        expected = ngram_perplexity(model(counted, len(tokenizer)), rows, collator)
        assert baselines[baseline] == pytest.approx(expected.perplexity, rel=1e-9)


def test_lora_figures_are_those_of_held_out_docstrings(finished, corpus):
    out, report = finished[0], report_of(finished[0])
    tokenizer, _, held_out = held_out_and_train(corpus, out, docstring_prose)
    collator = DataCollatorForCausalLM(tokenizer, max_length=64)
    rows = pack_dataset(held_out, collator)[:24]
    for name, when in (("causal", "before"), ("lora", "after")):
        score = perplexity(AutoModelForCausalLM.from_pretrained(out / name), rows, collator)
        assert report["lora"][f"perplexity_{when}"] == pytest.approx(score.perplexity, rel=1e-4)
        assert report["lora"]["tokens"] == score.num_tokens
    assert report["lora"]["text"] == "docstring prose"
    base = AutoModelForCausalLM.from_pretrained(out / "causal")
    merged = PeftModel.from_pretrained(base, out / "adapter").merge_and_unload()
    assert_same_weights(weights(merged), weights(AutoModelForCausalLM.from_pretrained(out / "lora")))


def test_published_folders_hold_no_pickle_and_checkpoints_lie_apart(finished):
    out = finished[0]
    names = {*PUBLISHED, "adapter", "tokenizer", "checkpoints", "report.json", "report.md", "loss.png", "state.json"}
    assert {path.name for path in out.iterdir()} == names
    pickles = [path.relative_to(out) for path in out.rglob("*") if path.suffix in (".bin", ".pt", ".pth", ".pkl")]
    assert pickles and {path.parts[0] for path in pickles} == {"checkpoints"}
    for name in PUBLISHED:
        held = set(tree(out / name))
        assert {"model.safetensors", "config.json", "tokenizer.json", "modeling_minillm.py", "README.md"} <= held
    kinds = {name: AutoModelForCausalLM.from_pretrained(out / name).config for name in PUBLISHED}
    assert {name: config.attention_type for name, config in kinds.items() if name == "prefix"} == {"prefix": "prefix"}
    assert kinds["alibi"].position_embedding_type == "alibi" and kinds["lora"].attention_type == "causal"


def test_report_page_and_picture(finished):
    out, report = finished[0], report_of(finished[0])
    picture = image.imread(out / "loss.png")
    assert picture.shape[0] > 300 and picture.shape[1] > 500 and picture[..., :3].std() > 0.05
    page = (out / "report.md").read_text("utf-8")
    assert "![training loss](loss.png)" in page
    for name in ("causal", "alibi", "prefix, after the prefix"):
        variant = report["variants"][name.partition(",")[0]]
        assert f"| {name} | {variant['perplexity']:.2f} | {variant['tokens']:,} |" in page
    for kind in ("unigram", "bigram"):
        assert f"| {kind} baseline | {report['baselines'][kind]:.2f} | {report['baselines']['tokens']:,} |" in page
    lora = report["lora"]
    assert f"from {lora['perplexity_before']:.2f} to {lora['perplexity_after']:.2f} ({lora['tokens']:,}" in page


def test_texts_of_the_process_without_minillm_are_those_of_the_models(finished):
    out, result = finished
    assert "loaded and generated in a process without MiniLLM: causal, prefix, alibi, lora" in result.output
    page = (out / "report.md").read_text("utf-8")
    for name in PUBLISHED:
        tokenizer = AutoTokenizer.from_pretrained(out / name, padding_side="left")
        model = AutoModelForCausalLM.from_pretrained(out / name)
        inputs = tokenizer(list(demo_module.PROMPTS), return_tensors="pt", padding=True)
        ids = model.generate(**inputs, max_new_tokens=40, do_sample=False, repetition_penalty=1.2)
        for text in tokenizer.batch_decode(ids, skip_special_tokens=True):
            assert f"`{name}`\n\n```text\n{text}\n```" in page


def test_every_curve_falls(finished):
    # Logits of fresh weights are near normal with variance width * initializer_range ** 2, so the first loss is near
    # log(vocabulary) + variance / 2.
    width, scale = (demo_module.ARCHITECTURE[name] for name in ("hidden_size", "initializer_range"))
    stages = json.loads((finished[0] / "state.json").read_text("utf-8"))["stages"]
    for name in PUBLISHED[:3]:
        steps, losses = zip(*stages[name]["curve"], strict=True)
        assert steps == tuple(range(1, STEPS + 1))
        assert losses[0] == pytest.approx(math.log(320) + width * scale**2 / 2, abs=0.2)
        assert losses[-1] < losses[0] - 1


def test_a_finished_demo_skips_everything_and_reports_the_same(finished, corpus, tmp_path, monkeypatch):
    out = shutil.copytree(finished[0], tmp_path / "demo")
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    for name in ("loss.png", "report.md", "report.json"):
        (out / name).unlink()
    monkeypatch.setattr(demo_module.Trainer, "train", lambda *rest, **options: pytest.fail("trained again"))
    result = run_demo(out, corpus)
    assert result.exit_code == 0, (result.output, result.exception)
    assert [f"skipped {stage}: finished in an earlier run" in result.output for stage in STAGES] == [True] * 7
    after = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    assert [path.name for path in before if after[path] != before[path] and path.suffix != ".png"] == []
    assert after.keys() == before.keys()


def test_a_lost_folder_is_made_again(finished, corpus, tmp_path):
    out = shutil.copytree(finished[0], tmp_path / "demo")
    expected = weights(AutoModelForCausalLM.from_pretrained(out / "alibi"))
    report = report_of(out)
    shutil.rmtree(out / "alibi")
    result = run_demo(out, corpus)
    assert result.exit_code == 0, (result.output, result.exception)
    assert "alibi was finished in an earlier run, but its folder is gone" in result.output
    assert_same_weights(weights(AutoModelForCausalLM.from_pretrained(out / "alibi")), expected)
    assert report_of(out) == report


class Interruption(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise KeyboardInterrupt


@pytest.mark.mostly_thorough("lora-4")
@pytest.mark.parametrize(("stage", "step"), [("prefix", 15), ("lora", 4)])
def test_an_interrupted_demo_goes_on_to_the_same_figures(stage, step, finished, corpus, tmp_path, monkeypatch):
    out = tmp_path / "demo"
    if stage == "lora":
        # All that comes before it, from the finished run.
        shutil.copytree(finished[0], out, ignore=shutil.ignore_patterns("lora", "adapter", "report*", "loss.png"))
        state = json.loads((out / "state.json").read_text("utf-8"))
        state["stages"] = {name: state["stages"][name] for name in (*STAGES[:5], "threads")}
        (out / "state.json").write_text(json.dumps(state), "utf-8")
    stock = demo_module.Trainer

    def interrupted(model, arguments, callbacks, **options):
        if Path(arguments.output_dir).name == stage:
            callbacks = [*callbacks, Interruption(step)]
        return stock(model, arguments, callbacks=callbacks, **options)

    with monkeypatch.context() as patch:
        patch.setattr(demo_module, "Trainer", interrupted)
        result = run_demo(out, corpus)
    assert result.exit_code == 130
    assert result.stderr == "interrupted: what was saved stays; the same command goes on from there\n"
    assert "report.json" not in tree(out) and stage not in {path.name for path in out.iterdir()}
    causal = (out / "causal" / "model.safetensors").stat()
    save_every = {"prefix": STEPS, "lora": STEPS // 4}[stage] // 4
    # A step is interrupted before its checkpoint is written.
    last = (step - 1) // save_every * save_every
    # As if the interruption had come while the next checkpoint was written.
    (out / "checkpoints" / stage / f"checkpoint-{last + save_every}").mkdir(exist_ok=True)
    result = run_demo(out, corpus)
    assert result.exit_code == 0, (result.output, result.exception)
    assert "skipped causal" in result.output and f"{stage}: going on from checkpoint-{last}" in result.output
    assert (out / "causal" / "model.safetensors").stat().st_mtime_ns == causal.st_mtime_ns
    assert report_of(out) == report_of(finished[0])
    for name in PUBLISHED:
        folders = (out / name, finished[0] / name)
        assert_same_weights(*(weights(AutoModelForCausalLM.from_pretrained(folder)) for folder in folders))
    curves = [json.loads((folder / "state.json").read_text("utf-8"))["stages"] for folder in (out, finished[0])]
    assert [curves[0][name]["curve"] == curves[1][name]["curve"] for name in PUBLISHED] == [True] * 4
