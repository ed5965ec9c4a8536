"""`minillm tokenizer extend` and `minillm tokenizer report`."""

import json

import pytest
from cli_cases import fail, invoke, python_source, save_small_model, small_tokenizer, succeed, tree
from matplotlib.image import imread
from transformers import AutoModelForCausalLM, AutoTokenizer
from vocabulary_cases import CHINESE

from minillm import MiniLLMTokenizer
from minillm.tokenization import measure_fertility, spell_new_tokens


@pytest.fixture
def folder(tmp_path):
    """A model with its tokenizer, a Chinese and an English file, and a program."""
    save_small_model(tmp_path / "model")
    (tmp_path / "zh.txt").write_text("\n".join(CHINESE), "utf-8")
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "en.txt").write_text("the reader returns each line\n" * 20, "utf-8")
    (tmp_path / "texts" / "a.py").write_text(python_source(1), "utf-8")
    return tmp_path


def test_extend_writes_a_larger_tokenizer(folder):
    told = succeed(
        "tokenizer", "extend", folder / "model", folder / "zh.txt", "--num-new", 40, "--out", folder / "out"
    )
    old, new = (AutoTokenizer.from_pretrained(folder / name) for name in ("model", "out"))
    assert told == f"{len(new)} tokens in {folder / 'out'} (40 new)\n" and len(new) == len(old) + 40
    assert type(new) is MiniLLMTokenizer and "config.json" not in tree(folder / "out")
    assert old.get_vocab().items() <= new.get_vocab().items()
    assert len(new.encode(CHINESE[0])) < 0.75 * len(old.encode(CHINESE[0]))


def test_extend_with_a_model_writes_one_that_fits(folder):
    arguments = (folder / "model", folder / "zh.txt", folder / "texts", "--num-new", 40, "--out", folder / "out")
    told = succeed("tokenizer", "extend", *arguments, "--model", folder / "model")
    assert "a model with rows for them" in told and "(40 new)" in told
    new, model = (kind.from_pretrained(folder / "out") for kind in (AutoTokenizer, AutoModelForCausalLM))
    old, before = (kind.from_pretrained(folder / "model") for kind in (AutoTokenizer, AutoModelForCausalLM))
    assert model.config.vocab_size == len(new) == len(old) + 40
    index, parts = next(iter(spell_new_tokens(old, new).items()))
    for table in ("get_input_embeddings", "get_output_embeddings"):
        rows, found = getattr(before, table)().weight, getattr(model, table)().weight
        assert (found[index] - rows[parts].mean(0)).abs().max() < 1e-6
    succeed("generate", folder / "out", "语言模型", "--max-new-tokens", 2)


def test_report_prints_and_writes_what_the_function_measures(folder):
    succeed("tokenizer", "extend", folder / "model", folder / "zh.txt", "--num-new", 40, "--out", folder / "larger")
    arguments = (folder / "model", folder / "zh.txt", folder / "texts", "--compare", folder / "larger")
    told = succeed("tokenizer", "report", *arguments, "--out", folder / "new" / "report", "--rare-below", 3)
    assert tree(folder / "new") == ["report", "report/report.json", "report/report.md", "report/report.png"]
    figures = json.loads((folder / "new" / "report" / "report.json").read_text("utf-8"))
    assert figures["corpus"] == [str(folder / "zh.txt"), str(folder / "texts")]
    old, new = figures["tokenizers"]
    assert old["tokenizer"] == str(folder / "model") and list(old["buckets"]) == ["chinese", "latin", "code", "all"]
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    documents = [("zh.txt", "\n".join(CHINESE)), ("a.py", python_source(1))]
    documents.append(("en.txt", "the reader returns each line\n" * 20))
    expected = measure_fertility(tokenizer, documents, name=str(folder / "model"), rare_below=3)
    assert old == json.loads(json.dumps(expected.to_dict()))
    page = (folder / "new" / "report" / "report.md").read_text("utf-8")
    for bucket in ("chinese", "latin", "code", "all"):
        before, after = (f"{one['buckets'][bucket]['tokens_per_character']:.3f}" for one in (old, new))
        assert before in told and after in told and before in page and after in page
    assert new["buckets"]["chinese"]["tokens"] < 0.75 * old["buckets"]["chinese"]["tokens"]
    assert new["buckets"]["code"]["tokens"] == old["buckets"]["code"]["tokens"]
    for _, text, _ in old["vocabulary"]["rarest"]:
        assert json.dumps(text, ensure_ascii=False) in page
    picture = imread(folder / "new" / "report" / "report.png")
    assert picture.shape[0] > 100 and picture.std() > 0.05
    # Another run takes the place of the files.
    succeed("tokenizer", "report", folder / "model", folder / "zh.txt", "--out", folder / "new" / "report")
    figures = json.loads((folder / "new" / "report" / "report.json").read_text("utf-8"))
    assert len(figures["tokenizers"]) == 1
    assert len(tree(folder / "new")) == 4


def test_report_without_out_writes_nothing(folder):
    before = tree(folder)
    told = succeed("tokenizer", "report", folder / "model", folder / "zh.txt")
    assert "chinese" in told and "never used" in told and tree(folder) == before


def test_bad_input_is_one_line_and_leaves_nothing(folder):
    small_tokenizer(400).save_pretrained(folder / "larger")
    (folder / "file").write_text("text", "utf-8")
    before = tree(folder)
    model, text, out = folder / "model", folder / "zh.txt", folder / "out"
    extend = ("tokenizer", "extend", model)
    assert "nowhere" in fail("tokenizer", "extend", folder / "nowhere", text, "--num-new", 5, "--out", out)
    assert "missing does not exist" in fail(*extend, folder / "missing", "--num-new", 5, "--out", out)
    assert "is not empty" in fail(*extend, text, "--num-new", 5, "--out", model)
    assert "is a file" in fail(*extend, text, "--num-new", 5, "--out", folder / "file")
    told = fail(*extend, text, "--num-new", 5, "--out", out, "--model", folder / "texts")
    assert "texts holds no model that can be loaded" in told
    told = fail("tokenizer", "extend", folder / "larger", text, "--num-new", 5, "--out", out, "--model", model)
    assert "has ids up to" in told and "only 320 rows" in told
    report = ("tokenizer", "report", model)
    assert "missing does not exist" in fail(*report, folder / "missing")
    assert "nowhere" in fail(*report, text, "--compare", folder / "nowhere")
    assert "is a file" in fail(*report, text, "--out", folder / "file")
    assert tree(folder) == before


def test_wordpiece_is_refused_with_its_reason(folder):
    texts = ["the reader returns each line"] * 5
    MiniLLMTokenizer.train_from_iterator(texts, vocab_size=60, model="wordpiece", show_progress=False).save_pretrained(
        folder / "wordpiece"
    )
    told = fail(
        "tokenizer", "extend", folder / "wordpiece", folder / "zh.txt", "--num-new", 5, "--out", folder / "out"
    )
    assert "other WordPiece cannot be extended" in told and not (folder / "out").exists()


def test_an_adapter_is_not_resized(folder):
    from peft import LoraConfig, get_peft_model

    model = AutoModelForCausalLM.from_pretrained(folder / "model")
    get_peft_model(model, LoraConfig(task_type="CAUSAL_LM")).save_pretrained(folder / "adapter")
    arguments = (folder / "model", folder / "zh.txt", "--num-new", 5, "--out", folder / "out")
    assert "is an adapter" in fail("tokenizer", "extend", *arguments, "--model", folder / "adapter")


@pytest.mark.parametrize(
    "arguments",
    [["extend", "t", "c", "--num-new", "0", "--out", "o"], ["extend", "t", "c"], ["report", "t"], ["report"]],
)
def test_wrong_usage_ends_with_two(arguments):
    assert invoke("tokenizer", *arguments).exit_code == 2


def test_a_missing_extra_is_named_before_work(folder, monkeypatch):
    monkeypatch.setattr("minillm.cli.console.EXTRAS", {"train": ("no_such_package",)})
    told = fail("tokenizer", "report", folder / "model", folder / "zh.txt", "--out", folder / "out")
    assert "pip install 'minillm-hf[train]'" in told and not (folder / "out").exists()
    succeed("tokenizer", "report", folder / "model", folder / "zh.txt")
