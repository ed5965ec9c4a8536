"""Against lm-evaluation-harness: the same figures where both have them, and prefixes where only ours has them.

The harness brings packages that slow down every start of transformers, so it is no part of the environment that the
default tests run in: `pip install lm_eval==0.4.13`, as `.ci/run` does beside it.
"""

import importlib.util
import json
import os
import subprocess
import sys

import pytest
import torch
from cli_cases import fail, invoke, save_small_model, small_model, small_tokenizer
from docs_cases import assert_shown, code_of
from evaluation_cases import documents, evaluated_model, item_records, items, naive_log_likelihood
from transformers import AutoModelForCausalLM

from minillm.evaluation.bits_per_byte import document_losses, summarize_losses
from minillm.evaluation.encoding import encode_pairs
from minillm.evaluation.item_scores import score_items
from minillm.evaluation.items import ItemSettings, Prompter

pytestmark = pytest.mark.slow

HARNESS_WAYS = {"sum": "acc", "char": "acc_norm", "byte": "acc_bytes", "pmi_empty": "acc_mutual_info"}
ROLLING = {
    "task": "texts",
    "dataset_path": "json",
    "output_type": "loglikelihood_rolling",
    "test_split": "train",
    "doc_to_text": "",
    "doc_to_target": "{{text}}",
    "metric_list": [{"metric": "bits_per_byte"}, {"metric": "byte_perplexity"}],
}
CHOICE = {
    "task": "choices",
    "dataset_path": "json",
    "output_type": "multiple_choice",
    "test_split": "train",
    "doc_to_text": "{{prompt}}",
    "doc_to_choice": "{{options}}",
    "doc_to_target": "{{answer}}",
    "metric_list": [{"metric": metric} for metric in HARNESS_WAYS.values()],
}
WRITING = {
    "task": "answers",
    "dataset_path": "json",
    "output_type": "generate_until",
    "test_split": "train",
    "doc_to_text": "{{prompt}}",
    "doc_to_target": "{{options[answer]}}",
    "generation_kwargs": {"until": ["\n"], "max_gen_toks": 8, "do_sample": False},
    "metric_list": [{"metric": "exact_match"}],
}


@pytest.fixture(scope="module", autouse=True)
def package():
    if importlib.util.find_spec("lm_eval") is None:
        if "CI" in os.environ:
            pytest.fail("CI lacks lm_eval")
        pytest.skip("needs pip install lm_eval==0.4.13")


@pytest.fixture(autouse=True)
def offline(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def write_task(folder, task, records):
    """A task of its own with its data, as a user keeps one: JSON is YAML."""
    folder.mkdir(exist_ok=True)
    data = folder / f"{task['task']}.jsonl"
    data.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), "utf-8")
    told = {**task, "dataset_kwargs": {"data_files": str(data)}}
    (folder / f"{task['task']}.yaml").write_text(json.dumps(told), "utf-8")
    return folder


def stock(model, tokenizer, **options):
    from lm_eval.models.huggingface import HFLM

    return HFLM(pretrained=model, tokenizer=tokenizer, batch_size=3, **options)


def ours(model, tokenizer, **options):
    from minillm.evaluation.harness import MiniLLMHarness

    return MiniLLMHarness(pretrained=model, tokenizer=tokenizer, batch_size=3, **options)


def run(harness, folder, task, **options):
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(folder), include_defaults=False)
    return simple_evaluate(harness, tasks=[task], task_manager=manager, bootstrap_iters=0, **options)


@pytest.mark.parametrize("variant", ["causal", "prefix", "alibi"])
@pytest.mark.parametrize("length", [None, 32])
def test_bits_per_byte_are_the_harness_s(variant, length, tmp_path):
    tokenizer = small_tokenizer()
    model = small_model(tokenizer, variant)
    texts = documents()
    write_task(tmp_path / "tasks", ROLLING, [{"text": document.text} for document in texts])
    losses = document_losses(model, tokenizer, texts, max_length=length)
    result = summarize_losses(losses)
    for harness in (stock, ours):
        told = run(harness(model, tokenizer, max_length=length), tmp_path / "tasks", "texts")
        figures = told["results"]["texts"]
        assert result.bits_per_byte.value == pytest.approx(figures["bits_per_byte,none"], rel=1e-6)
        assert result.byte_perplexity.value == pytest.approx(figures["byte_perplexity,none"], rel=1e-6)
        found = {sample["doc"]["text"]: sample["resps"][0][0] for sample in told["samples"]["texts"]}
        for document, loss in zip(texts, losses, strict=True):
            assert -loss.loss == pytest.approx(found[document.text], rel=1e-6)


def test_losses_are_the_harness_s_with_a_large_vocabulary():
    """Sums over it round, and do so alike: `logsumexp` is 4e-7 away here, and 4e-6 with a released model."""
    from lm_eval.api.instance import Instance

    tokenizer = small_tokenizer()
    model = small_model(tokenizer, vocab_size=150_000)
    with torch.no_grad():
        model.lm_head.weight *= 4.0
        model.lm_head.weight[len(tokenizer) :] *= 0.3
    text = documents()[-1]
    (loss,) = document_losses(model, tokenizer, [text])
    requests = [Instance("loglikelihood_rolling", {}, (text.text,), 0)]
    (found,) = stock(model, tokenizer).loglikelihood_rolling(requests, disable_tqdm=True)
    assert -loss.loss == pytest.approx(found, rel=1.5e-7)


@pytest.mark.parametrize("template", [False, True], ids=["plain", "template"])
@pytest.mark.parametrize("variant", ["causal", "prefix"])
@pytest.mark.parametrize("shots", [0, 2])
def test_each_item_is_scored_as_by_the_harness(variant, template, shots, tmp_path):
    """With the prompts written out, shots and all; options in Chinese have no blank before them in ours alone."""
    tokenizer = small_tokenizer()
    model = small_model(tokenizer, variant, max_position_embeddings=800)
    asked = items(count=12)[:-1]
    settings = ItemSettings(ways=("likelihood",), shots=shots, chat_template=template)
    scores = score_items(model, tokenizer, asked, settings)
    made = Prompter(tokenizer, asked, settings)
    task = {**CHOICE, "target_delimiter": ""} if template else CHOICE
    records = [
        {"prompt": made.cloze(index), "options": list(item.options), "answer": item.answer}
        for index, item in enumerate(asked)
    ]
    write_task(tmp_path / "tasks", task, records)
    samples = run(ours(model, tokenizer), tmp_path / "tasks", "choices")["samples"]["choices"]
    assert len(samples) == len(asked)
    for sample in samples:
        index = sample["doc_id"]
        count = len(asked[index].options)
        found = [float(response[0][0]) for response in sample["resps"]]
        alone = [one - other for one, other in zip(found[:count], found[count:], strict=True)]
        assert scores.options["sum"][index] == pytest.approx(found[:count], rel=1e-6)
        assert scores.options["pmi_empty"][index] == pytest.approx(alone, rel=1e-5, abs=1e-5)
        for way, metric in HARNESS_WAYS.items():
            assert scores.correct(way)[index] == bool(sample[metric]), (way, index)


@pytest.mark.parametrize("variant", ["causal", "prefix"])
def test_a_template_is_applied_as_by_the_harness(variant, tmp_path):
    tokenizer = small_tokenizer()
    model = small_model(tokenizer, variant, max_position_embeddings=800)
    asked = items(count=6)[:-1]
    scores = score_items(model, tokenizer, asked, ItemSettings(ways=("likelihood",), chat_template=True))
    records = [
        record | {"prompt": f"Question: {record['question']}\nAnswer:"} for record in item_records(count=6)[:-1]
    ]
    write_task(tmp_path / "tasks", CHOICE, records)
    told = run(ours(model, tokenizer), tmp_path / "tasks", "choices", apply_chat_template=True)
    for sample in told["samples"]["choices"]:
        index = sample["doc_id"]
        found = [float(response[0][0]) for response in sample["resps"]][: len(asked[index].options)]
        assert scores.options["sum"][index] == pytest.approx(found, rel=1e-6)


@pytest.mark.parametrize("variant", ["causal", "prefix"])
def test_generated_answers_are_the_harness_s(variant, tmp_path):
    tokenizer = small_tokenizer()
    model = small_model(tokenizer, variant, max_position_embeddings=400)
    asked = items(count=6)
    scores = score_items(model, tokenizer, asked, ItemSettings(ways=("generation",), max_new_tokens=8))
    records = [{**record, "prompt": f"Question: {record['question']}\nAnswer:"} for record in item_records(count=6)]
    write_task(tmp_path / "tasks", WRITING, records)
    for sample in run(ours(model, tokenizer), tmp_path / "tasks", "answers")["samples"]["answers"]:
        assert scores.verdicts[sample["doc_id"]].text.strip() == sample["resps"][0][0].strip()


@pytest.mark.parametrize(
    ("contexts", "continuations"),
    [
        (["the reader", "the reader ", "a\n\n", ""], [" returns", "returns", "b", " returns"]),
        (["<|startoftext|>the reader", "", ""], [" of", "<|startoftext|>x", "北京"]),
    ],
)
@pytest.mark.parametrize("adds", [False, True], ids=["bare", "adds_bos"])
def test_pairs_are_encoded_as_by_the_harness(adds, contexts, continuations, monkeypatch):
    from lm_eval.api.instance import Instance

    tokenizer = small_tokenizer()
    tokenizer.add_bos_token = adds
    assert adds == (tokenizer.bos_token_id in tokenizer("a")["input_ids"])
    harness = stock(small_model(tokenizer), tokenizer)
    seen = []
    monkeypatch.setattr(harness, "_loglikelihood_tokens", lambda requests, **_: seen.extend(requests))
    pairs = zip(contexts, continuations, strict=True)
    harness.loglikelihood([Instance("loglikelihood", {}, pair, 0) for pair in pairs])
    assert encode_pairs(tokenizer, contexts, continuations) == [(context, ids) for _, context, ids in seen]


def test_a_prefix_model_is_scored_with_what_it_generates_from():
    """Its own greedy text is the likeliest only where the context is its prefix."""
    from lm_eval.api.instance import Instance

    model, tokenizer = evaluated_model("prefix-alibi")
    requests, expected = [], []
    for number in range(20):
        context = documents()[3].text[7 * number : 7 * number + 40].strip()
        ids = tokenizer(context, return_tensors="pt")
        written = model.generate(**ids, max_new_tokens=5, min_new_tokens=5, do_sample=False)
        continuation = written[0, ids["input_ids"].shape[1] :].tolist()
        requests.append(((context, ""), ids["input_ids"][0].tolist(), continuation))
        expected.append(naive_log_likelihood(model, ids["input_ids"][0].tolist(), continuation))
    told = ours(model, tokenizer)._loglikelihood_tokens(requests, disable_tqdm=True)
    assert [score for score, _ in told] == pytest.approx(expected, rel=1e-9)
    assert all(greedy for _, greedy in told)
    causal = stock(model, tokenizer, logits_cache=False)._loglikelihood_tokens(requests, disable_tqdm=True)
    assert sum(greedy for _, greedy in causal) < 10
    pairs = [Instance("loglikelihood", {}, (text[0], " returns"), 0) for text, _, _ in requests[:3]]
    for instance, (score, _) in zip(pairs, ours(model, tokenizer).loglikelihood(pairs), strict=True):
        ((context, ids),) = encode_pairs(tokenizer, [instance.args[0]], [" returns"])
        assert score == pytest.approx(naive_log_likelihood(model, context, ids), rel=1e-9)


def test_too_long_a_context_is_cut_on_its_left():
    model, tokenizer = evaluated_model("prefix")
    context, continuation = list(range(5, 60)), [7, 8, 9]
    ((score, _),) = ours(model, tokenizer, max_length=20)._loglikelihood_tokens(
        [(("", ""), context, continuation)], disable_tqdm=True
    )
    assert score == pytest.approx(naive_log_likelihood(model, context[-18:], continuation), rel=1e-9)


def test_models_without_a_prefix_are_the_stock_class_s():
    tokenizer = small_tokenizer()
    requests = [(("a", "b"), [5, 6, 7], [8, 9]), (("a", "c"), [5, 6, 7], [8, 11]), ((None), [1], [4, 5])]
    for fields in ({}, {"attention_type": "prefix", "prompt_is_prefix": False}):
        model = small_model(tokenizer, **fields)
        told = ours(model, tokenizer)._loglikelihood_tokens(requests, disable_tqdm=True)
        assert told == stock(model, tokenizer)._loglikelihood_tokens(requests, disable_tqdm=True)


def test_what_prefixes_do_not_allow_is_refused():
    tokenizer = small_tokenizer()
    model = small_model(tokenizer, "prefix")
    from minillm.evaluation.harness import MiniLLMHarness

    with pytest.raises(ValueError, match="`logits_cache=True`"):
        ours(model, tokenizer, logits_cache=True)
    with pytest.raises(ValueError, match="`batch_size='auto'`"):
        MiniLLMHarness(model, tokenizer=tokenizer, batch_size="auto")


def test_the_command_runs_tasks_of_a_folder(tmp_path):
    folder = save_small_model(tmp_path / "model", "prefix", max_position_embeddings=400)
    other = save_small_model(tmp_path / "other", seed=3, max_position_embeddings=400)
    records = [record | {"prompt": f"{record['question']}"} for record in item_records(count=6)]
    write_task(write_task(tmp_path / "tasks", CHOICE, records), WRITING, records)
    out = tmp_path / "out"
    arguments = ("--tasks", "choices,answers", "--task-folder", tmp_path / "tasks", "--out", out, "--shots", 1)
    result = invoke("evaluate", folder, *arguments, "--compare", other, "--limit", 4)
    assert result.exit_code == 0, (result.output, result.exception)
    assert "acc_norm" in result.stdout and "exact_match" in result.stdout
    figures = json.loads((out / "results.json").read_text("utf-8"))
    for name, model, prefix in ((folder, 0, ""), (other, 1, "base-")):
        loaded = AutoModelForCausalLM.from_pretrained(name)
        options = {"num_fewshot": 1, "limit": 4, "random_seed": 0, "numpy_random_seed": 0, "fewshot_random_seed": 0}
        told = run(ours(loaded, small_tokenizer()), tmp_path / "tasks", "choices", **options)
        assert figures["models"][model]["tasks"]["choices"]["acc,none"] == told["results"]["choices"]["acc,none"]
        lines = (out / f"{prefix}task-choices.jsonl").read_text("utf-8").splitlines()
        assert len(lines) == 4
    (tmp_path / "tasks" / "choices.jsonl").write_text("{}\n", "utf-8")
    result = invoke("evaluate", folder, "--tasks", "choices", "--task-folder", tmp_path / "tasks")
    # The harness shows bars of its own before it.
    assert result.exit_code == 1 and "error: lm-evaluation-harness: " in result.stderr.splitlines()[-1]
    assert "no task nonsense in lm-evaluation-harness" in fail("evaluate", folder, "--tasks", "nonsense")
    assert "task folder" in fail("evaluate", folder, "--tasks", "choices", "--task-folder", tmp_path / "none")


def test_the_class_is_known_to_the_harness_by_its_name(tmp_path):
    folder = save_small_model(tmp_path / "model", "prefix", max_position_embeddings=400)
    records = [record | {"prompt": record["question"]} for record in item_records(count=4)]
    write_task(tmp_path / "tasks", CHOICE, records)
    import minillm.evaluation.harness  # noqa: F401

    named = run("minillm", tmp_path / "tasks", "choices", model_args=f"pretrained={folder}", device="cpu")
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), small_tokenizer()
    given = run(ours(model, tokenizer), tmp_path / "tasks", "choices")
    assert named["results"] == given["results"]


def test_the_code_of_the_page_runs(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", code_of("harness")], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert_shown("harness", done.stdout)
