"""`minillm generate` against `model.generate` called directly."""

import pytest
import torch
from cli_cases import fail, save_small_model, succeed
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed

PROMPTS = ["def value_1(line):", "the reader returns", "class"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    return {name: save_small_model(root / name, name) for name in ("causal", "prefix", "alibi")}


def directly(folder, prompts, **options):
    """The texts of `model.generate` with a seed of 0, printed one after the other."""
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(folder)
    inputs = tokenizer(prompts, return_tensors="pt", padding=True)
    set_seed(options.pop("seed", 0))
    ids = model.generate(**inputs, **{"max_new_tokens": 12, "do_sample": False, **options})
    return "".join(f"{text}\n" for text in tokenizer.batch_decode(ids, skip_special_tokens=True))


def generate(folder, *arguments, stdin=None):
    return succeed("generate", folder, *arguments, "--max-new-tokens", 12, stdin=stdin)


@pytest.mark.parametrize("variant", ["causal", "prefix", "alibi"])
def test_one_prompt_and_a_batch_equal_generate(variant, folders):
    for prompts in (PROMPTS[:1], PROMPTS):
        expected = directly(folders[variant], prompts)
        assert generate(folders[variant], *prompts) == expected
        assert all(prompt in expected for prompt in prompts)


@pytest.mark.parametrize("variant", ["causal", "prefix"])
def test_a_prompt_in_a_batch_is_continued_as_alone(variant, folders):
    assert generate(folders[variant], *PROMPTS) == "".join(generate(folders[variant], prompt) for prompt in PROMPTS)


def test_a_prefix_model_reads_its_prompt_in_both_directions(folders):
    tokenizer = AutoTokenizer.from_pretrained(folders["prefix"])
    model = AutoModelForCausalLM.from_pretrained(folders["prefix"])
    ids = tokenizer(PROMPTS[0], return_tensors="pt")["input_ids"]
    length = ids.shape[1]
    for _ in range(12):
        mask = (torch.arange(ids.shape[1]) < length).long()[None]
        ids = torch.cat([ids, model(ids, prefix_mask=mask).logits[:, -1:].argmax(-1)], 1)
    assert generate(folders["prefix"], PROMPTS[0]) == tokenizer.decode(ids[0], skip_special_tokens=True) + "\n"


def test_prompts_come_from_the_standard_input_line_by_line(folders):
    told = generate(folders["causal"], stdin=f"{PROMPTS[0]}\n\n{PROMPTS[1]}\r\n{PROMPTS[2]}")
    assert told == directly(folders["causal"], PROMPTS)


@pytest.mark.parametrize("variant", ["causal", "prefix"])
@pytest.mark.parametrize(
    "sampling", [[], ["--temperature", 0.8, "--top-p", 0.9, "--seed", 3]], ids=["greedy", "sampled"]
)
def test_streaming_prints_the_same(variant, sampling, folders):
    told = generate(folders[variant], PROMPTS[0], "--stream", *sampling)
    assert told == generate(folders[variant], PROMPTS[0], *sampling)


def test_sampling_follows_the_seed(folders):
    arguments = (folders["causal"], *PROMPTS, "--temperature", 0.8, "--top-p", 0.9)
    options = {"do_sample": True, "temperature": 0.8, "top_p": 0.9}
    told = {seed: generate(*arguments, "--seed", seed) for seed in (0, 1)}
    assert told[0] != told[1] and told[0] == generate(*arguments)
    for seed in (0, 1):
        assert told[seed] == directly(folders["causal"], PROMPTS, seed=seed, **options)


def test_beams_equal_generate(folders):
    told = generate(folders["causal"], *PROMPTS, "--num-beams", 3)
    assert told == directly(folders["causal"], PROMPTS, num_beams=3)
    assert told != generate(folders["causal"], *PROMPTS)


def test_text_is_printed_as_it_is(folders):
    prompt = "\tif a[bold]: # :smile: [/] \\[x] http://a.b/" + "c" * 120
    told = generate(folders["causal"], prompt)
    assert told.startswith(prompt) and told == directly(folders["causal"], [prompt])


def test_blanks_are_filled_and_other_prompts_continued(folders):
    prompts = ["def[MASK](line):\n    return[gMASK]", PROMPTS[0], "the[sMASK]returns 北京  \t"]
    tokenizer = AutoTokenizer.from_pretrained(folders["prefix"])
    model = AutoModelForCausalLM.from_pretrained(folders["prefix"])
    filled = model.fill(prompts[::2], tokenizer, max_new_tokens=12, do_sample=False)
    told = generate(folders["prefix"], *prompts)
    assert told == f"{filled.texts[0]}\n{directly(folders['prefix'], [PROMPTS[0]])}{filled.texts[1]}\n"
    assert all(fill for fills in filled.fills for fill in fills)
    beams = model.fill(prompts[0], tokenizer, max_new_tokens=12, do_sample=False, num_beams=2)
    assert generate(folders["prefix"], prompts[0], "--num-beams", 2) == f"{beams.texts[0]}\n"
    torch.manual_seed(3)
    sampled = model.fill(prompts[0], tokenizer, max_new_tokens=12, do_sample=True, temperature=0.8, top_p=1.0)
    assert generate(folders["prefix"], prompts[0], "--temperature", 0.8, "--seed", 3) == f"{sampled.texts[0]}\n"


def test_a_blank_before_a_start_token_and_one_of_a_causal_model_are_continued(folders):
    started = "the reader[gMASK]<|startofpiece|>"
    assert generate(folders["prefix"], started) == directly(folders["prefix"], [started])
    read = directly(folders["causal"], ["the[MASK]"])
    assert generate(folders["causal"], "the[MASK]", "--special-tokens") == read
    assert generate(folders["causal"], "the[MASK]").startswith("the[MASK]") and not read.startswith("the[MASK]")


@pytest.mark.parametrize("stream", [[], ["--stream"]], ids=["whole", "streamed"])
def test_special_tokens_in_prompts_are_text_unless_asked_otherwise(stream, folders):
    prompt = "the <|endoftext|> reader<|user|>"
    tokenizer = AutoTokenizer.from_pretrained(folders["causal"])
    model = AutoModelForCausalLM.from_pretrained(folders["causal"])
    ids = tokenizer(prompt, split_special_tokens=True, return_tensors="pt")["input_ids"]
    assert tokenizer.decode(ids[0], skip_special_tokens=True) == prompt
    continued = model.generate(ids, max_new_tokens=12, do_sample=False)
    expected = tokenizer.decode(continued[0], skip_special_tokens=True)
    assert generate(folders["causal"], prompt, *stream) == f"{expected}\n"
    read = generate(folders["causal"], prompt, "--special-tokens", *stream)
    assert read == directly(folders["causal"], [prompt]) and read.startswith("the  reader")


def test_beside_blanks_and_start_tokens_special_tokens_are_text(folders):
    tokenizer = AutoTokenizer.from_pretrained(folders["prefix"])
    model = AutoModelForCausalLM.from_pretrained(folders["prefix"])
    parts = ["the<|user|>", "[MASK]", " <|endoftext|>"]
    ids = [token for part in parts for token in tokenizer(part, split_special_tokens=part != "[MASK]")["input_ids"]]
    row = [*ids, tokenizer.sop_token_id]
    inputs = {
        "input_ids": torch.tensor([row]),
        "prefix_mask": torch.tensor([[1] * len(ids) + [0]]),
        "position_ids": torch.tensor([[*range(len(ids)), ids.index(tokenizer.mask_token_id)]]),
    }
    told = generate(folders["prefix"], "".join(parts))
    assert told.startswith("the<|user|>") and told.endswith(" <|endoftext|>\n") and "[MASK]" not in told
    first = model(**inputs).logits[0, -1].argmax()
    assert told.removeprefix("the<|user|>").startswith(tokenizer.decode(first))
    started = "the<|user|>[gMASK]<|startofpiece|>"
    assert generate(folders["prefix"], started).startswith("the<|user|>")
    assert "[gMASK]" not in generate(folders["prefix"], started)


@pytest.mark.parametrize(
    ("arguments", "stdin", "words"),
    [
        (["a", "b", "--stream"], None, "--stream prints one prompt"),
        (["a", "--stream", "--num-beams", "2"], None, "--stream prints one prompt"),
        (["a", "--top-p", "0.9"], None, "--top-p 0.9 needs sampling: set --temperature above 0"),
        ([], "", "no prompt"),
        ([], "\n \n", "no prompt"),
        (["a", ""], None, "no prompt"),
    ],
    ids=["stream-of-two", "stream-of-beams", "top-p-without-sampling", "no-prompt", "blank-lines", "empty-prompt"],
)
def test_contradictions_are_one_line(arguments, stdin, words, folders):
    assert words in fail("generate", folders["causal"], *arguments, stdin=stdin)


def test_a_blank_is_not_streamed(folders):
    assert "--stream prints a continuation" in fail("generate", folders["prefix"], "the[MASK]", "--stream")


def test_what_is_no_model_is_one_line(folders, tmp_path):
    assert "is no folder here" in fail("generate", tmp_path / "nowhere", "a")
    assert "nowhere-at-all is no folder here" in fail("generate", "nowhere-at-all", "a")
    (tmp_path / "empty").mkdir()
    assert "holds no tokenizer" in fail("generate", tmp_path / "empty", "a")
    damaged = save_small_model(tmp_path / "damaged")
    weights = damaged / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    assert "holds no model" in fail("generate", damaged, "a")
    weights.unlink()
    assert "model.safetensors" in fail("generate", damaged, "a")
    (damaged / "tokenizer.json").write_text("{", "utf-8")
    assert "tokenizer.json" in fail("generate", damaged, "a")
