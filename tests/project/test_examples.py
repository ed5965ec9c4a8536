"""The examples, each run as a user runs it: they learn, and what they write loads."""

import ast
import re

import pytest
import torch
from cli_cases import save_small_model, tree, weights, write_corpus
from example_runs import EXAMPLES, run_example
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from minillm.conversion import export
from minillm.evaluation import perplexity
from minillm.training import DataCollatorForSFT

DOCS = EXAMPLES.parent / "docs"
EXAMPLE_PAGES = ("training.md", "tokenizers.md", "conversion.md", "infilling.md")
# An experiment also writes down and draws what it found.
LONGEST = {"deep_norms.py": 210, "glm_proof.py": 450, "glm_proof_picture.py": 75}


def losses(told):
    return [float(loss) for loss in re.findall(r"'loss': '?([\d.]+)", told)]


@pytest.fixture(scope="module", params=["prefix", pytest.param("causal", marks=pytest.mark.slow)])
def runs(request, tmp_path_factory):
    """A variant pre-trained by the first example and tuned by the second, with what both printed."""
    folder = tmp_path_factory.mktemp(request.param)
    corpus = write_corpus(folder / "corpus", files=20)
    options = ("--corpus", corpus, "--steps", 40, "--length", 64, "--hidden-size", 32)
    told = run_example("pretrain.py", "--variant", request.param, *options, "--out", "base", folder=folder)
    tuned = run_example("sft_lora.py", "base", "--steps", 40, "--samples", 120, "--out", "tuned", folder=folder)
    return request.param, folder, told, tuned


@pytest.mark.slow
def test_pretraining_learns_and_its_folder_loads(runs):
    variant, folder, told, _ = runs
    assert len(losses(told)) == 20 and losses(told)[-1] < losses(told)[0] - 1.5
    model = AutoModelForCausalLM.from_pretrained(folder / "base")
    assert model.config.attention_type == variant and model.config.hidden_size == 32
    assert model.config.vocab_size == len(AutoTokenizer.from_pretrained(folder / "base"))
    assert sorted(path.name for path in folder.iterdir()) == ["base", "corpus", "tuned"]
    score = float(re.search(r"held-out perplexity ([\d.]+) on \d+ tokens", told)[1])
    assert score < model.config.vocab_size / 4
    assert not [name for name in tree(folder) if name.endswith((".bin", ".pt", ".pkl"))]


def test_tuning_learns_answers_and_the_merged_model_equals_the_adapter(runs):
    variant, folder, _, told = runs
    assert losses(told)[-1] < losses(told)[0]
    found = re.search(r"perplexity of answers ([\d.]+) -> ([\d.]+)", told)
    assert float(found[2]) < 0.7 * float(found[1])
    assert sorted(path.name for path in (folder / "tuned").iterdir()) == ["adapter", "merged"]
    merged = AutoModelForCausalLM.from_pretrained(folder / "tuned" / "merged").eval()
    base = AutoModelForCausalLM.from_pretrained(folder / "base")
    adapted = PeftModel.from_pretrained(base, folder / "tuned" / "adapter").eval()
    tokenizer = AutoTokenizer.from_pretrained(folder / "tuned" / "merged")
    turns = [{"role": "user", "content": "abc"}, {"role": "assistant", "content": "3 letters"}]
    sample = tokenizer.apply_chat_template(turns, return_dict=True, return_assistant_tokens_mask=True)
    collator = DataCollatorForSFT(tokenizer, max_length=64, prompt_is_prefix=variant == "prefix")
    scores = [perplexity(model, [sample], collator) for model in (merged, adapted)]
    assert scores[0].nll == pytest.approx(scores[1].nll, abs=1e-5)
    # The answer and the end token; the prompt is not scored.
    assert scores[0].num_tokens == len(tokenizer("3 letters")["input_ids"]) + 1
    # The rows of the roles' tokens were trained, the others were not.
    before = AutoModelForCausalLM.from_pretrained(folder / "base")
    table, old = (weights(model)["model.embed_tokens.weight"] for model in (merged, before))
    changed = (table != old).any(-1).nonzero().flatten().tolist()
    assert changed == sorted(tokenizer.convert_tokens_to_ids(["<|user|>", "<|assistant|>"]))
    assert torch.equal(weights(merged)["lm_head.weight"], table)


@pytest.mark.slow
def test_extending_gives_a_model_that_reads_chinese_in_fewer_tokens(tmp_path):
    save_small_model(tmp_path / "base", tie_word_embeddings=True)
    told = run_example("extend_vocabulary.py", "base", "--steps", 20, "--out", "extended", folder=tmp_path)
    before, after = map(float, re.findall(r"([\d.]+) tokens per character", told))
    # Three bytes a character; the built-in lines are short, so many characters occur once only.
    assert before == 3.0 and after < 2.2
    found = re.search(r"held-out loss ([\d.]+) -> ([\d.]+) nats per character", told)
    assert float(found[2]) < 0.8 * float(found[1])
    old, new = (AutoTokenizer.from_pretrained(tmp_path / name) for name in ("base", "extended"))
    base, model = (AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in ("base", "extended"))
    assert model.config.vocab_size == len(new) == len(old) + 60
    # Only new rows are trained beside LoRA.
    assert torch.equal(weights(model)["lm_head.weight"][: len(old)], weights(base)["lm_head.weight"])


@pytest.mark.slow
def test_a_converted_llama_learns_and_comes_out_a_llama(tmp_path):
    save_small_model(tmp_path / "minillm")
    export(tmp_path / "minillm", tmp_path / "native", "llama")
    corpus = write_corpus(tmp_path / "corpus", files=20)
    options = ("--corpus", corpus, "--steps", 40, "--length", 64, "--out", "out")
    told = run_example("convert_and_tune.py", "native", *options, folder=tmp_path)
    assert "converted: MiniLLMForCausalLM" in told and len(losses(told)) == 20
    found = re.search(r"held-out perplexity ([\d.]+) -> ([\d.]+) on \d+ tokens", told)
    # Weights are random, so that an adapter cannot do much.
    assert float(found[2]) < 0.99 * float(found[1])
    merged, back = (AutoModelForCausalLM.from_pretrained(tmp_path / "out" / name) for name in ("merged", "llama"))
    assert type(back) is LlamaForCausalLM
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out" / "llama")
    inputs = tokenizer("def the_0(reader):", return_tensors="pt")
    torch.testing.assert_close(back(**inputs).logits, merged(**inputs).logits, atol=1e-5, rtol=0)


def test_examples_are_short_and_named_on_a_page():
    pages = "".join((DOCS / name).read_text("utf-8") for name in EXAMPLE_PAGES)
    files = sorted(EXAMPLES.glob("*.py"))
    names = "convert_and_tune deep_norms extend_vocabulary glm_proof glm_proof_picture pretrain sft_lora".split()
    assert [file.stem for file in files] == names
    for file in files:
        text = file.read_text("utf-8")
        assert len(text.splitlines()) <= LONGEST.get(file.name, 85) and f"examples/{file.name}" in pages
        assert ast.get_docstring(ast.parse(text))
