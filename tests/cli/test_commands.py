"""The `minillm` command: starting it, looking at models, making tokenizers, missing extras."""

import importlib.util
import json
import logging as standard_logging
import re
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
from cli_cases import MIXED_TEXT, fail, invoke, python_source, save_small_model, succeed, tree
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

import minillm
from minillm import MiniLLMConfig, MiniLLMForCausalLM
from minillm.cli.console import EXTRAS, one_line_errors
from minillm.configuration.presets import PRESETS

COMMANDS = ["demo", "tokenizer", "train", "generate", "export", "push", "presets", "info"]


def cells(line):
    return [cell.strip() for cell in re.split("[│┃|]", line)[1:-1]]


def test_the_module_and_the_console_script_are_the_command():
    script = str(Path(sys.executable).with_name("minillm"))
    told = subprocess.run([sys.executable, "-m", "minillm", "--help"], capture_output=True, text=True, check=True)
    assert told.stderr == "" and "Usage: minillm" in told.stdout
    assert all(re.search(rf"^\W*{name} ", told.stdout, re.MULTILINE) for name in COMMANDS)
    version = subprocess.run([script, "--version"], capture_output=True, text=True, check=True)
    assert version.stderr == "" and version.stdout == f"{minillm.__version__}\n"


COMPLETED = """
import contextlib, io, json, os, sys
from minillm.cli.main import app

def complete(words):
    os.environ |= {"_MINILLM_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": str(words.count(" "))}
    with contextlib.redirect_stdout(io.StringIO()) as told, contextlib.suppress(SystemExit):
        app(prog_name="minillm")
    return told.getvalue().split()

found = [complete(words) for words in ("minillm presets gl", "minillm info glm-", "minillm info elsewhere")]
print(json.dumps([*found, sorted({"torch", "transformers"} & set(sys.modules))]))
"""


def test_a_shell_completes_presets_and_families_without_torch():
    done = subprocess.run([sys.executable, "-c", COMPLETED], capture_output=True, text=True, check=True)
    families, presets, nothing, heavy = json.loads(done.stdout)
    assert set(families) == {preset.family for preset in PRESETS.values() if preset.family.startswith("gl")}
    assert families and sorted(presets) == sorted(name for name in PRESETS if name.startswith("glm-"))
    assert nothing == heavy == []


@pytest.mark.slow
def test_an_error_of_the_real_command_is_one_line(tmp_path):
    script = str(Path(sys.executable).with_name("minillm"))
    done = subprocess.run([script, "info", "llama-3-8"], capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 1 and done.stdout == ""
    assert len(done.stderr.splitlines()) == 1 and "llama-3-8b" in done.stderr


@pytest.mark.parametrize("arguments", [["nonsense"], ["generate"], ["train", "--max-steps", "0"], ["info", "a", "b"]])
def test_wrong_usage_ends_with_two(arguments):
    result = invoke(*arguments)
    assert result.exit_code == 2 and "Traceback" not in result.output


def rows_of(told):
    return {row[0]: row[1:] for row in (cells(line) for line in told.splitlines() if "│" in line)}


def test_presets_lists_every_preset_with_its_parameters_shape_and_source():
    told = rows_of(succeed("presets"))
    assert list(told) == list(PRESETS)
    for name in ("minillm-causal-10m", "minillm-prefix-10m", "minillm-alibi-10m"):
        real = MiniLLMForCausalLM(MiniLLMConfig.from_preset(name))
        unique = {parameter.data_ptr(): parameter.numel() for parameter in real.parameters()}
        assert told[name][:2] == [f"{sum(unique.values()):,}", "8 x 256"]
    # Published sizes: "8.03B" on the model's own page, and arXiv 2302.13971, table 2 (6.7B).
    assert told["llama-3-8b"][0] == "8,030,261,248"
    assert told["llama-7b"] == [
        "6,738,415,616",
        "32 x 4096",
        "LLaMA 7B (arXiv 2302.13971, table 2; the released config)",
    ]


def test_presets_of_one_family():
    told = succeed("presets", "baichuan")
    assert set(rows_of(told)) == {name for name, preset in PRESETS.items() if preset.family == "baichuan"}
    assert told.splitlines()[0].strip() == "baichuan"


def test_presets_refuses_an_unknown_family():
    told = fail("presets", "chatglm4")
    assert "unknown family 'chatglm4'; did you mean 'chatglm" in told
    assert all(preset.family in told for preset in PRESETS.values())


def test_figures_of_presets_are_whole_in_a_narrow_terminal(monkeypatch):
    monkeypatch.setattr("minillm.cli.console.console._width", 80)
    assert rows_of(succeed("presets", "llama"))["llama-3.1-405b"][:2] == ["405,853,388,800", "126 x 16384"]


def test_info_says_what_a_folder_holds(tmp_path):
    folder = save_small_model(tmp_path / "model", "prefix", num_key_value_heads=2)
    told = succeed("info", folder)
    rows = {row[0]: row[1:] for row in (cells(line) for line in told.splitlines()) if len(row) > 1}
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert rows["parameters"][0].startswith(f"{model.num_parameters():,}, ")
    # Keys and values, 2 layers, 2 key/value heads of width 8, 2 bytes each.
    assert rows["cache"][0] == "yes: 128 bytes a token in 16 bits"
    # What a user looks for first stands first.
    topics = [topic for topic in rows if topic]
    assert topics[:7] == ["size", "length", "parameters", "memory", "operations", "cache", "attention"]
    assert "both directions" in rows["attention"][0] and "RoPE" in rows["positions"][0]
    assert rows["eager, sdpa, minillm_blocks"][:2] == ["yes", "yes"]
    flash = "flash_attention_2, flash_attention_3, flash_attention_4"
    assert rows[flash][:2] == ["refused", "refused"] and "sdpa" in rows[flash][2]
    assert rows["flex_attention"][0] == "forward only"
    file = succeed("info", folder / "config.json")
    assert [line for line in told.splitlines() if "│" in line] == [line for line in file.splitlines() if "│" in line]


@pytest.mark.parametrize(
    ("preset", "words"),
    [
        ("minillm-causal-10m", ["causal", "RoPE", "rmsnorm", "multi-head", "11,014,400"]),
        ("bloom-560m", ["ALiBi", "layernorm", "559,214,592"]),
        ("gpt2", ["learned", "plain (MLP)", "gelu_new", "124,439,808"]),
        ("llama-3-8b", ["grouped-query", "base 500000"]),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_info_says_what_a_preset_is(preset, words):
    told = succeed("info", preset)
    assert not [word for word in words if word not in told], told


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        (
            {"vocab_size": 16384},
            ["from all logits (", "beyond 128 tokens, up to 1,024 unless"],
        ),
        ({"skip_logits": None}, ["from all logits ("]),
        ({"skip_logits": True}, ["in training without holding logits (off: skip_logits=False)"]),
        ({"attention_type": "bidirectional"}, ["whole"]),
        ({"attention_type": "bidirectional", "position_embedding_type": "alibi"}, ["in blocks of queries"]),
    ],
)
def test_info_says_what_is_chosen_for_speed(fields, words, tmp_path):
    MiniLLMConfig(**fields).save_pretrained(tmp_path)
    rows = {row[0]: row[1] for row in map(cells, succeed("info", tmp_path).splitlines()) if len(row) > 1}
    told = " ".join(rows[topic] for topic in ("loss", "attention in training"))
    for word in words:
        assert word in told


@pytest.mark.parametrize(
    ("found", "words"),
    [("No module named 'liger_kernel'", "by torch, not by Liger's kernel: No module named"), (print, "by Liger's")],
)
def test_info_says_whether_the_loss_is_ligers(found, words, tmp_path, monkeypatch):
    monkeypatch.setattr("minillm.cli.inspection.find_liger", lambda: found)
    MiniLLMConfig().save_pretrained(tmp_path)
    assert words in succeed("info", tmp_path)


def test_info_says_where_alibi_is_folded(tmp_path):
    MiniLLMConfig(position_embedding_type="alibi").save_pretrained(tmp_path)
    told = " ".join(" ".join(cells(line)) for line in succeed("info", tmp_path).splitlines())
    assert "bfloat16 up to 65,536 or float16 up to 8,192 tokens, unless packed" in told
    MiniLLMConfig(position_embedding_type="alibi", alibi_rounding="bloom").save_pretrained(tmp_path)
    assert "attention on cuda" not in succeed("info", tmp_path)


def test_info_says_which_caches_have_room(tmp_path):
    MiniLLMConfig(hidden_size=256, num_attention_heads=8, num_key_value_heads=2).save_pretrained(tmp_path)
    assert "room for tokens to come, from 1,024 tokens" in succeed("info", tmp_path)
    for fields in ({"sliding_window": 7}, {"attention_type": "bidirectional"}):
        MiniLLMConfig(**fields).save_pretrained(tmp_path)
        assert "room for tokens" not in succeed("info", tmp_path)


def test_info_counts_a_sliding_window_and_a_model_without_cache(tmp_path):
    MiniLLMConfig(sliding_window=7, use_cache=False).save_pretrained(tmp_path)
    told = succeed("info", tmp_path)
    assert "window of 7 tokens" in told and re.search(r"cache\s+│\s+yes: .*use_cache=True", told)
    MiniLLMConfig(attention_type="bidirectional").save_pretrained(tmp_path)
    assert re.search(r"cache\s+│\s+no: a bidirectional", succeed("info", tmp_path))


def test_info_says_what_an_adapter_is(tmp_path):
    base = save_small_model(tmp_path / "base")
    config = LoraConfig(
        r=3, lora_alpha=7, target_modules=["v_proj", "q_proj"], trainable_token_indices=[5], task_type="CAUSAL_LM"
    )
    get_peft_model(AutoModelForCausalLM.from_pretrained(base), config).save_pretrained(tmp_path / "adapter")
    rows = {row[0]: row[1] for row in map(cells, succeed("info", tmp_path / "adapter").splitlines()) if len(row) > 1}
    assert rows == {
        "kind": "LORA adapter: changes to a base model, no model of its own",
        "base model": str(base),
        "rank": "3 (alpha 7, dropout 0.0)",
        "changed modules": "q_proj, v_proj",
        "tokens whose rows are trained": "5",
        "to merge it": f"minillm export {base} OUT --adapter {tmp_path / 'adapter'}",
    }
    (tmp_path / "adapter" / "adapter_config.json").write_text("{", "utf-8")
    assert "adapter holds no adapter that can be loaded" in fail("info", tmp_path / "adapter")


def test_info_says_what_it_was_given_instead_of_a_model(tmp_path):
    assert "error: the name is empty" in fail("info", "")
    assert "/dev/null is no file" in fail("info", "/dev/null")
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(b"\x08\xff\xfe\x00")
    assert f"{weights} is no config file" in fail("info", weights)
    kinds = {"packed_rows.json": "packed rows", "tokenizer.json": "a tokenizer", "notes.txt": "no model"}
    for file, kind in kinds.items():
        folder = tmp_path / kind
        folder.mkdir()
        (folder / file).write_text("{}", "utf-8")
        told = fail("info", folder)
        assert f"{folder} holds {kind}" in told and "config.json" in told and "model_type" not in told


def test_a_misspelt_preset_is_answered_with_few():
    told = fail("info", "minillm-causal-11m")
    assert "minillm-causal-10m" in told and sum(f"'{name}'" in told for name in PRESETS) <= 3 and len(told) < 300


def test_info_refuses_what_is_no_minillm_model(tmp_path):
    LlamaConfig().save_pretrained(tmp_path / "llama")
    assert "'llama'" in fail("info", tmp_path / "llama")
    assert "minillm-causal-10m" in fail("info", "minillm-causal-11m")
    assert "nowhere" in fail("info", tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    assert "empty" in fail("info", tmp_path / "empty")
    broken = tmp_path / "broken.json"
    broken.write_text("{", "utf-8")
    assert "broken.json" in fail("info", broken)
    broken.write_text(json.dumps({"model_type": "minillm", "norm_bias": True}), "utf-8")
    assert "norm_type" in fail("info", broken)


@pytest.fixture
def mixed_corpus(tmp_path):
    folder = tmp_path / "corpus"
    (folder / "deeper").mkdir(parents=True)
    (folder / "english.txt").write_text("".join(python_source(seed) for seed in range(5)), "utf-8")
    (folder / "deeper" / "mixed.md").write_text(MIXED_TEXT * 20, "utf-8")
    return folder


@pytest.mark.parametrize("kind", ["byte_bpe", "sentencepiece_bpe", "unigram", "wordpiece"])
def test_tokenizer_train_makes_a_tokenizer_that_round_trips(kind, mixed_corpus, tmp_path):
    out = tmp_path / "new" / "tokenizer"
    told = succeed("tokenizer", "train", mixed_corpus, "--out", out, "--vocab-size", 400, "--model", kind)
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert type(tokenizer) is minillm.MiniLLMTokenizer
    assert told == f"{len(tokenizer)} tokens in {out}\n"
    assert len(tokenizer) <= 400 and {".", "deeper"}.isdisjoint(tree(out))
    # Word-piece puts blanks around every sign and Chinese character.
    squeeze = (lambda text: "".join(text.split())) if kind == "wordpiece" else str
    for text in (MIXED_TEXT, python_source(3)):
        assert squeeze(tokenizer.decode(tokenizer(text)["input_ids"])) == squeeze(text)
    # It has learned something: fewer tokens than bytes.
    assert len(tokenizer(python_source(3))["input_ids"]) < 0.7 * len(python_source(3))


def test_tokenizer_train_takes_several_files_and_learns_from_all(tmp_path):
    for name, word in (("one", "abracadabra"), ("two", "hocuspocus")):
        (tmp_path / name).write_text(f"{word} " * 50, "utf-8")
    succeed("tokenizer", "train", tmp_path / "one", tmp_path / "two", "--out", tmp_path / "t", "--vocab-size", 300)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "t")
    assert [len(tokenizer(word)["input_ids"]) for word in (" abracadabra", " hocuspocus")] == [1, 1]


def bad_corpora(folder):
    """Corpora that no command can use, with a word of the error that each must give."""
    (folder / "empty").mkdir()
    (folder / "binary").mkdir()
    (folder / "binary" / "a.bin").write_bytes(b"\x00\x01\x02" * 50)
    (folder / "latin.txt").write_bytes("größer".encode("latin-1"))
    (folder / "blank.txt").write_text(" \n\n", "utf-8")
    return {
        "missing": "does not exist",
        "empty": "holds no text",
        "binary": "is binary",
        "binary/a.bin": "is binary",
        "latin.txt": "not UTF-8",
        "blank.txt": "is empty",
    }


@pytest.mark.parametrize("name", ["missing", "empty", "binary", "binary/a.bin", "latin.txt", "blank.txt"])
def test_tokenizer_train_refuses_a_bad_corpus_and_leaves_nothing(name, tmp_path):
    word = bad_corpora(tmp_path)[name]
    before = tree(tmp_path)
    told = fail("tokenizer", "train", tmp_path / name, "--out", tmp_path / "new" / "out", "--vocab-size", 300)
    assert word in told and name in told
    assert tree(tmp_path) == before


def test_tokenizer_train_names_an_unreadable_file(tmp_path, monkeypatch):
    file = tmp_path / "secret.txt"
    file.write_text("text", "utf-8")

    opened = Path.open

    def refuse(path, *mode, **options):
        if path == file:
            raise PermissionError(13, "Permission denied", str(path))
        return opened(path, *mode, **options)

    # A permission bit would not stop the tests of a super-user.
    monkeypatch.setattr(Path, "open", refuse)
    told = fail("tokenizer", "train", file, "--out", tmp_path / "out", "--vocab-size", 300)
    assert "secret.txt cannot be read: Permission denied" in told
    assert tree(tmp_path) == ["secret.txt"]


@pytest.mark.parametrize("kind", ["byte_bpe", "sentencepiece_bpe", "unigram", "wordpiece"])
def test_tokenizer_train_refuses_a_vocabulary_that_is_too_small(kind, mixed_corpus, tmp_path):
    out = tmp_path / "out"
    told = fail("tokenizer", "train", mixed_corpus, "--out", out, "--vocab-size", 9, "--model", kind)
    assert "vocab_size=9 is too small" in told and not out.exists()


def test_a_folder_with_files_is_never_replaced(mixed_corpus, tmp_path):
    out = tmp_path / "precious"
    out.mkdir()
    (out / "thesis.txt").write_text("years of work", "utf-8")
    file = tmp_path / "file"
    file.write_text("text", "utf-8")
    model = save_small_model(tmp_path / "model")
    before = tree(tmp_path)
    for target, word in ((out, "is not empty"), (file, "is a file")):
        assert word in fail("tokenizer", "train", mixed_corpus, "--out", target, "--vocab-size", 300)
        assert word in fail("export", model, target)
        assert word in fail("train", "--model", model, "--data", mixed_corpus, "--out", target)
    assert tree(tmp_path) == before and (out / "thesis.txt").read_text("utf-8") == "years of work"
    shutil.rmtree(out)
    out.mkdir()
    succeed("tokenizer", "train", mixed_corpus, "--out", out, "--vocab-size", 300)
    assert (out / "tokenizer.json").exists()


@pytest.mark.parametrize("missing", [("datasets", "matplotlib"), ("matplotlib",), ("datasets",)], ids="+".join)
def test_demo_without_its_extras_prints_one_pip_line_and_does_nothing(missing, tmp_path, monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name in missing else found(name))
    told = fail("demo", "--out", tmp_path / "demo")
    assert told == f"error: {' and '.join(missing)} missing. Install: pip install 'minillm-hf[train]'"
    assert tree(tmp_path) == []


def test_extras_are_those_of_the_package():
    from importlib.metadata import requires

    for extra, names in EXTRAS.items():
        listed = [line for line in requires("minillm-hf") if re.search(rf"extra == .{extra}.$", line)]
        assert {re.match(r"[\w-]+", line)[0].replace("-", "_") for line in listed} == set(names)


@pytest.mark.slow
def test_all_commands_but_the_demo_run_without_extras():
    """Blocks the extras for a whole process, and imports what every command imports."""
    code = (
        "import sys\n"
        f"for name in {sorted({name for names in EXTRAS.values() for name in names})}: sys.modules[name] = None\n"
        "import minillm.cli.training_run, minillm.cli.generation_run, minillm.cli.publishing, minillm.cli.inspection\n"
        "from typer.testing import CliRunner\nfrom minillm.cli.main import app\n"
        "result = CliRunner().invoke(app, ['info', 'gpt2'])\nassert result.exit_code == 0, result.output\n"
        "result = CliRunner().invoke(app, ['demo', '--out', '/nonexistent/demo'])\nprint(result.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == (
        "error: datasets and matplotlib and zstandard missing. Install: pip install 'minillm-hf[train]'"
    )


def test_a_command_keeps_libraries_quiet_only_while_it_runs():
    from huggingface_hub.utils import are_progress_bars_disabled
    from transformers.utils import logging

    remark, warning = "mtime may not be reliable on this filesystem", "something is wrong"
    loggers = [logging.get_logger(f"transformers.{name}") for name in ("trainer", "trainer_utils")]
    hub_before = are_progress_bars_disabled()
    for _ in range(2):
        with one_line_errors():
            assert not logging.is_progress_bar_enabled()
            assert are_progress_bars_disabled() == hub_before
            with warnings.catch_warnings(record=True) as seen:
                warnings.warn("old", FutureWarning, stacklevel=1)
            assert seen == []
            assert [logger.filter(record(text)) for logger in loggers for text in (remark, warning)] == [
                False,
                True,
            ] * 2
        assert logging.is_progress_bar_enabled() and are_progress_bars_disabled() == hub_before
        assert all(logger.filter(record(remark)) for logger in loggers)


def record(text):
    return standard_logging.LogRecord("transformers", standard_logging.WARNING, "", 0, text, (), None)
