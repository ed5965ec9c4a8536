"""`minillm evaluate` against the functions that it calls, and what it refuses."""

import io
import json
import shutil

import pytest
import torch
from cli_cases import fail, python_source, save_adapter, save_small_model, succeed
from evaluation_cases import OPEN_ITEM, item_records
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer

from minillm.cli import evaluation_run
from minillm.data import load_corpus
from minillm.evaluation import (
    ItemSettings,
    compare_items,
    document_losses,
    loss_difference,
    read_items,
    score_items,
    summarize_items,
    summarize_losses,
)

FILES = ["documents.jsonl", "results.json"]
ITEM_FILES = ["differing.jsonl", "items.jsonl", "results.json"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Models, an adapter, texts and items, in one folder."""
    root = tmp_path_factory.mktemp("evaluate")
    for name in ("causal", "prefix"):
        save_small_model(root / name, name, max_position_embeddings=400)
    save_small_model(root / "other", seed=3, max_position_embeddings=400)
    save_small_model(root / "glm", "prefix", position_embedding_type="glm_2d", max_position_embeddings=400)
    save_small_model(root / "short", max_position_embeddings=48)
    save_adapter(root / "causal", root / "adapter")
    (root / "texts").mkdir()
    for number in range(4):
        (root / "texts" / f"{number}.py").write_text(python_source(number, functions=1), "utf-8")
    lines = [json.dumps({"text": python_source(number, functions=1)}) for number in range(2)]
    (root / "texts.jsonl").write_text("\n".join(lines), "utf-8")
    records = [*item_records(count=4), OPEN_ITEM]
    (root / "items.jsonl").write_text("".join(f"{json.dumps(record)}\n" for record in records), "utf-8")
    return root


def load(folder):
    return AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)


def read_lines(path):
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def read_results(out):
    return json.loads((out / "results.json").read_text("utf-8"))


def as_json(value):
    return json.loads(json.dumps(value))


@pytest.mark.parametrize("name", ["causal", "prefix", "glm"])
def test_texts(name, folder, tmp_path):
    out = tmp_path / "out"
    told = succeed("evaluate", folder / name, "--data", folder / "texts", "--out", out, "--seed", 5)
    losses = document_losses(*load(folder / name), load_corpus(folder / "texts"), glm=name == "glm")
    result = summarize_losses(losses, seed=5)
    assert sorted(path.name for path in out.iterdir()) == FILES
    assert read_lines(out / "documents.jsonl") == [pytest.approx(loss._asdict()) for loss in losses]
    (found,) = read_results(out)["models"]
    for figure in ("bits_per_byte", "byte_perplexity", "perplexity"):
        assert found["data"][figure] == pytest.approx(getattr(result, figure)._asdict())
    assert found["data"]["num_bytes"] == result.num_bytes and found["items"] is None
    assert f"{result.bits_per_byte.value:.4f}" in told and f"{result.perplexity.value:.2f}" in told
    assert f"written: {out}" in told


def test_lines_of_json_with_text(folder, tmp_path):
    for number, name in enumerate(("texts.jsonl", "texts")):
        arguments = ("--limit", 2, "--max-length", 32, "--batch-size", 3, "--device", "cpu", "--dtype", "float32")
        succeed("evaluate", folder / "causal", "--data", folder / name, "--out", tmp_path / str(number), *arguments)
    lines, files = (read_lines(tmp_path / name / "documents.jsonl") for name in "01")
    assert [each["loss"] for each in lines] == [each["loss"] for each in files] and len(lines) == 2
    assert [each["name"] for each in lines] == ["texts.jsonl#1", "texts.jsonl#2"]
    whole = document_losses(*load(folder / "causal"), load_corpus(folder / "texts"))
    cut = document_losses(*load(folder / "causal"), load_corpus(folder / "texts"), max_length=32)
    assert lines[0]["loss"] == pytest.approx(cut[0].loss) and lines[0]["loss"] != pytest.approx(whole[0].loss)


@pytest.mark.parametrize("name", ["causal", "prefix", "glm"])
def test_items_in_every_way(name, folder, tmp_path):
    out = tmp_path / "out"
    arguments = ("--rotate", "--shots", 2, "--chat-template", "--shot-file", folder / "items.jsonl", "--seed", 1)
    told = succeed("evaluate", folder / name, "--items", folder / "items.jsonl", "--out", out, *arguments)
    items = read_items(folder / "items.jsonl")
    settings = ItemSettings(shots=2, rotate=True, chat_template=True, seed=1)
    scores = score_items(*load(folder / name), items, settings)
    expected = summarize_items(scores, seed=1)
    assert sorted(path.name for path in out.iterdir()) == ITEM_FILES
    assert read_lines(out / "items.jsonl") == [as_json(scores.record(index)) for index in range(len(items))]
    (found,) = read_results(out)["models"]
    assert found["items"] == as_json(expected)
    assert set(expected["ways"]) >= {"sum", "token", "char", "byte", "pmi", "pmi_empty", "letters", "exact", "choice"}
    for way, figures in expected["ways"].items():
        assert f"{figures['accuracy']['value']:.3f}" in next(line for line in told.splitlines() if f" {way} " in line)
    assert f"bits per byte of the right options {expected['gold_bits_per_byte']['value']:.3f}" in told
    assert "letters chosen, of" in told and "Cohen's kappa" in told


def test_one_way_and_shots_from_all_of_the_file(folder, tmp_path):
    arguments = ("--way", "likelihood", "--shots", 3, "--limit", 2)
    succeed("evaluate", folder / "causal", "--items", folder / "items.jsonl", "--out", tmp_path / "out", *arguments)
    items = read_items(folder / "items.jsonl")
    scores = score_items(*load(folder / "causal"), items[:-1], ItemSettings(ways=("likelihood",), shots=3))
    records = read_lines(tmp_path / "out" / "items.jsonl")
    assert records != [as_json(scores.record(index)) for index in range(2)]
    settings = ItemSettings(ways=("likelihood",), shots=3, shot_items=items)
    scores = score_items(*load(folder / "causal"), items[:2], settings)
    assert records == [as_json(scores.record(index)) for index in range(2)]


def test_before_and_after_tuning(folder, tmp_path):
    arguments = ("--data", folder / "texts", "--items", folder / "items.jsonl", "--max-new-tokens", 4)
    told = succeed(
        "evaluate",
        folder / "causal",
        "--adapter",
        folder / "adapter",
        "--compare",
        folder / "other",
        "--out",
        tmp_path / "out",
        *arguments,
    )
    tuned, base = load(folder / "adapter"), load(folder / "other")
    texts, items = load_corpus(folder / "texts"), read_items(folder / "items.jsonl")
    losses, base_losses = document_losses(*tuned, texts), document_losses(*base, texts)
    settings = ItemSettings(max_new_tokens=4)
    scores, base_scores = score_items(*tuned, items, settings), score_items(*base, items, settings)
    results = read_results(tmp_path / "out")
    difference = loss_difference(losses, base_losses)
    assert results["compared"]["data"]["bits_per_byte"] == pytest.approx(difference._asdict())
    assert results["compared"]["items"] == as_json(compare_items(scores, base_scores))
    for prefix, own in (("", scores), ("base-", base_scores)):
        records = read_lines(tmp_path / "out" / f"{prefix}items.jsonl")
        assert records == [as_json(own.record(index)) for index in range(len(items))]
    assert [each["loss"] for each in read_lines(tmp_path / "out" / "base-documents.jsonl")] == pytest.approx(
        [each.loss for each in base_losses]
    )
    assert (tmp_path / "out" / "changed.jsonl").exists()
    assert f"{difference.value:+.4f}" in told and "gained" in told


def test_weights_are_read_in_the_type_that_is_asked_for(folder, monkeypatch):
    seen = []
    prepare = evaluation_run.prepare_documents
    monkeypatch.setattr(
        evaluation_run, "prepare_documents", lambda model, *rest: seen.append(model.dtype) or prepare(model, *rest)
    )
    for dtype in ("auto", "bfloat16"):
        succeed("evaluate", folder / "causal", "--data", folder / "texts", "--dtype", dtype)
    assert seen == [torch.float32, torch.bfloat16]


def test_a_terminal_shows_how_far_it_is(folder, monkeypatch):
    shown = io.StringIO()
    monkeypatch.setattr(evaluation_run, "errors", Console(file=shown, force_terminal=True, width=200))
    told = succeed("evaluate", folder / "causal", "--data", folder / "texts", "--items", folder / "items.jsonl")
    assert f"evaluating {folder / 'causal'}" in shown.getvalue()
    for what in ("windows", "options", "letters", "answers"):
        assert what in shown.getvalue() and f"{what} ━" not in told


BAD = {
    "nothing": ([], "nothing to evaluate: give --data, --items or --tasks"),
    "no corpus": (["--data", "none"], "no data set that `datasets` can load"),
    "no json lines": (["--data", "none.jsonl"], "none.jsonl does not exist"),
    "no items": (["--items", "none.jsonl"], "none.jsonl is no file"),
    "items in a line": (["--items", "texts.jsonl"], "texts.jsonl line 1: `question` must be a text, not None"),
    "texts in a line": (
        ["--data", "items.jsonl"],
        "items.jsonl line 1 has the keys ['answer', 'group', 'options', 'question']",
    ),
    "rotate": (["--data", "texts", "--rotate"], "--rotate needs --items"),
    "shots": (["--data", "texts", "--shots", "2"], "--shots needs --items or --tasks"),
    "way": (["--data", "texts", "--way", "letters"], "--way needs --items"),
    "template": (["--data", "texts", "--chat-template"], "--chat-template needs --items or --tasks"),
    "new tokens": (["--data", "texts", "--max-new-tokens", "9"], "--max-new-tokens needs --items"),
    "folder": (["--data", "texts", "--task-folder", "texts"], "--task-folder needs --tasks"),
    "special": (["--items", "items.jsonl", "--special-tokens"], "--special-tokens needs --data"),
    "shot file": (["--items", "items.jsonl", "--shot-file", "items.jsonl"], "--shot-file needs --shots"),
    "no letters": (["--items", "items.jsonl", "--way", "generation", "--rotate"], "--rotate needs --way letters"),
    "too many shots": (["--items", "items.jsonl", "--shots", "9"], "item 1: 9 shots are asked for, but 4 others"),
    "device": (["--data", "texts", "--device", "nonsense"], "--device nonsense cannot be used here"),
    "out": (["--data", "texts", "--out", "texts"], "texts is not empty"),
    "adapter": (["--data", "texts", "--adapter", "other"], "other is no adapter"),
    "base": (["--data", "texts", "--compare", "texts"], "texts holds no"),
    "glm": (["--data", "texts", "--glm"], "only a MiniLLM with `attention_type='prefix'` fills blanks"),
    "length": (["--items", "items.jsonl", "--max-length", "9"], "longer than the model's 9 tokens (up to "),
    "base's length": (["--items", "items.jsonl", "--compare", "short"], "longer than the model's 48 tokens"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_is_wrong_is_said_in_one_line_before_any_forward(case, folder, tmp_path, monkeypatch):
    monkeypatch.chdir(folder)
    monkeypatch.setattr("minillm.MiniLLMForCausalLM.forward", None)
    arguments, words = BAD[case]
    before = sorted(path.name for path in folder.rglob("*"))
    out = [] if "--out" in arguments else ["--out", tmp_path / "out"]
    assert words in fail("evaluate", "causal", *arguments, *out)
    assert sorted(path.name for path in folder.rglob("*")) == before and not (tmp_path / "out").exists()


def test_no_model_is_said_in_one_line(folder, tmp_path):
    assert "is no folder here" in fail("evaluate", tmp_path / "none", "--data", folder / "texts")
    assert "holds no tokenizer" in fail("evaluate", folder / "texts", "--data", folder / "texts")


def test_the_harness_that_is_missing_is_named_with_its_extra(folder, monkeypatch):
    monkeypatch.setattr("minillm.cli.console.importlib.util.find_spec", lambda name: None)
    told = fail("evaluate", folder / "causal", "--tasks", "arc_easy")
    assert told == "error: lm_eval missing. Install: pip install 'minillm-hf[eval]'"


def test_a_loss_that_is_no_number_is_named_and_leaves_nothing(folder, tmp_path):
    broken = shutil.copytree(folder / "causal", tmp_path / "broken")
    model = AutoModelForCausalLM.from_pretrained(broken)
    with torch.no_grad():
        model.model.norm.weight[0] = float("nan")
    model.save_pretrained(broken)
    told = fail("evaluate", broken, "--data", folder / "texts", "--out", tmp_path / "out")
    assert "the model's loss is nan in the document " in told and not (tmp_path / "out").exists()


def test_a_tokenizer_without_begin_and_end_is_refused(folder, tmp_path):
    bare = shutil.copytree(folder / "causal", tmp_path / "bare")
    tokenizer = AutoTokenizer.from_pretrained(bare)
    tokenizer.bos_token = tokenizer.eos_token = None
    tokenizer.save_pretrained(bare)
    assert "neither bos_token nor eos_token" in fail("evaluate", bare, "--data", folder / "texts")
