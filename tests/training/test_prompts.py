"""Conversations with a prefix model: each prompt is a bidirectional block of its own, answers are causal, by one rule
for the collator, forward, generate(), the chat template and the command line."""

import copy
import random
from types import SimpleNamespace

import pytest
import torch
from cli_cases import succeed
from matrix_cases import LENGTH, VOCAB, assert_close, double_weights, loud_model, rows, tiny_config
from reference import reference_logits
from transformers import DynamicCache, StaticCache
from variant_cases import model_of, tokens
from variants import variants

import minillm.modeling_minillm
from minillm import MiniLLMConfig, MiniLLMForCausalLM, MiniLLMTokenizer, find_prompts, number_prompts
from minillm.training import DataCollatorForSFT, pack_dataset

ANSWER, USER, SYSTEM, END = 5, 6, 7, 2
CHAT = {"answer_start_token_id": ANSWER, "turn_token_ids": [SYSTEM, USER, ANSWER], "eos_token_id": END}
SHORT = ("--max-steps", "2", "--batch-size", "2", "--max-length", "32")
SCHEMES = variants("rope alibi learned")


def prompts_by_hand(ids, real):
    """One token after the other: what it is, and which prompt it belongs to."""
    numbers, answering, count, in_prompt = [], False, 0, False
    for token, is_real in zip(ids, real, strict=True):
        if not is_real:
            numbers.append(0)
            continue
        if token in (ANSWER, USER, SYSTEM):
            answering = False
        if not answering and not in_prompt:
            count += 1
        in_prompt = not answering
        numbers.append(count if in_prompt else 0)
        answering = token == ANSWER or (answering and token != END)
    return numbers


def test_prompts_are_found_as_by_hand():
    seed = random.randrange(2**31)
    print(f"seed {seed}")
    rng = random.Random(seed)
    for _ in range(100):
        ids = [[rng.choice([ANSWER, USER, SYSTEM, END, *range(8, 12)]) for _ in range(16)] for _ in range(3)]
        real = [[rng.random() < 0.8 for _ in range(16)] for _ in range(3)]
        got = find_prompts(torch.tensor(ids), ANSWER, [SYSTEM, USER, ANSWER], [END], torch.tensor(real).long())
        assert got.tolist() == [prompts_by_hand(*row) for row in zip(ids, real, strict=True)]


def test_prompts_written_out():
    ids = torch.tensor([[SYSTEM, 8, USER, 9, ANSWER, 10, END, USER, 11, ANSWER, 12, 13, USER, 14, ANSWER]])
    got = find_prompts(ids, ANSWER, [SYSTEM, USER, ANSWER], [END])
    assert got.tolist() == [[1, 1, 1, 1, 1, 0, 0, 2, 2, 2, 0, 0, 3, 3, 3]]
    assert find_prompts(torch.tensor([[8, 9, END, 10]]), ANSWER, [USER, ANSWER], [END]).tolist() == [[1, 1, 1, 1]]


def test_numbers_written_out():
    assert number_prompts(rows("1100110100")).tolist() == rows("1100220300").tolist()
    assert number_prompts(rows("0011001100")).tolist() == rows("0011002200").tolist()
    assert number_prompts(rows("5500777010")).tolist() == rows("1100222030").tolist()
    # Padding neither ends a run nor belongs to one.
    got = number_prompts(rows("0111011001"), rows("0011011111"))
    assert got.tolist() == rows("0011011002").tolist()
    got = number_prompts(rows("1101101101"), document_ids=rows("0000011111"))
    assert got.tolist() == rows("1102201102").tolist()


CONVERSATION = rows("1100220300")


@pytest.mark.parametrize("back_end", ["eager", "sdpa"])
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize(
    "inputs",
    [
        {"prefix_mask": rows("1100220300", "1111002233")},
        {"prefix_mask": rows("0011002200", "0000001111")},
        {"prefix_mask": rows("0110220003", "0011022033"), "attention_mask": rows("0110111111", "0011111111")},
        {"prefix_mask": rows("1102102203", "1011220100"), "document_ids": rows("0000111111", "0011111222")},
    ],
    ids=["turns", "answer_first", "padding", "documents"],
)
@torch.no_grad()
def test_several_prompts_equal_the_twin(scheme, back_end, inputs):
    model = loud_model(tiny_config(attention_type="prefix", **SCHEMES[scheme]))
    model.set_attn_implementation(back_end)
    ids = tokens()
    real = inputs.get("attention_mask", torch.ones(2, LENGTH)).bool()
    expected = reference_logits(model.config, double_weights(model), ids, **inputs)
    assert_close(model(ids, **inputs).logits[real], expected[real], scheme)


PAD = 0
OF_A_CHAT = [PAD, END, ANSWER, USER, SYSTEM]


def continued(model, text, **options):
    """Four more tokens, none of which is padding or starts or ends a turn."""
    options |= {"suppress_tokens": OF_A_CHAT, "pad_token_id": PAD}
    return model.generate(text, max_new_tokens=4, do_sample=False, **options)


def later_turns(kind):
    """What is written behind an answer: the end is there, or cut off, or written by hand."""
    return {
        "ended": [[END, USER, 9, 10, ANSWER], [END, USER, 11, ANSWER]],
        "cut_short": [[USER, 9, 10, ANSWER], [USER, 11, ANSWER]],
        "begun_answer": [[END, USER, 9, ANSWER, 12], [USER, 11, ANSWER, 13, 14]],
    }[kind]


@pytest.mark.parametrize("kind", ["ended", "cut_short", "begun_answer"])
@pytest.mark.parametrize("cache_kind", ["dynamic", "static"])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_cached_equals_uncached_over_three_turns(scheme, cache_kind, kind):
    """And both the twin, which reads the conversation with the numbers found by hand."""
    config = tiny_config(attention_type="prefix", **CHAT, **SCHEMES[scheme])
    model = loud_model(config)
    cache = DynamicCache(config=config) if cache_kind == "dynamic" else StaticCache(config, max_cache_len=50)
    text = torch.tensor([[SYSTEM, 8, USER, 9, ANSWER]])
    for added in (*later_turns(kind), []):
        whole = continued(model, text)
        assert torch.equal(continued(model, text, past_key_values=cache), whole)
        assert torch.equal(continued(model, text, use_cache=False), whole)
        numbers = torch.tensor([prompts_by_hand(text[0].tolist(), [True] * text.shape[1])])
        answer = text
        with torch.no_grad():
            for _ in range(4):
                mask = torch.nn.functional.pad(numbers, (0, answer.shape[1] - numbers.shape[1]))
                logits = reference_logits(config, double_weights(model), answer, prefix_mask=mask)
                logits[..., OF_A_CHAT] = -torch.inf
                answer = torch.cat([answer, logits[:, -1:].argmax(-1)], dim=1)
        assert torch.equal(whole, answer)
        text = torch.cat([whole, torch.tensor([added], dtype=torch.long)], dim=1)


def test_turns_of_a_padded_batch():
    model = loud_model(tiny_config(attention_type="prefix", **CHAT))
    short, long = [USER, 9, ANSWER], [USER, 9, ANSWER, 10, 11, END, USER, 12, ANSWER]
    batch = torch.tensor([[0] * 6 + short, long])
    mask = (batch != 0).long()
    got = continued(model, batch, attention_mask=mask)
    assert torch.equal(got[:1, 6:], continued(model, torch.tensor([short])))
    assert torch.equal(got[1:], continued(model, torch.tensor([long])))
    beams = {"num_beams": 3, "num_return_sequences": 1}
    got = continued(model, batch, attention_mask=mask, **beams)
    assert torch.equal(got[1:], continued(model, torch.tensor([long]), **beams))


def test_without_the_tokens_of_a_chat_the_prompt_is_one():
    ids = torch.tensor([[8, 9, 10, 11, 12, 13]])
    with_tokens, without = (tiny_config(attention_type="prefix", **fields) for fields in (CHAT, {}))
    assert torch.equal(continued(loud_model(with_tokens), ids), continued(loud_model(without), ids))


@pytest.fixture(scope="module")
def tokenizer():
    texts = ["Hello there, how are you? I am well. What is two times three? Six."] * 4
    return MiniLLMTokenizer.train_from_iterator(texts, vocab_size=330, show_progress=False)


CHATS = [
    [("user", "Hello?"), ("assistant", "I am well."), ("user", "What?"), ("assistant", "Six.")],
    [("system", "Be brief."), ("user", "two"), ("assistant", "three"), ("user", "you?"), ("assistant", "")],
]


def test_collator_template_and_generate_read_a_conversation_alike(tokenizer):
    assert tokenizer.answer_start_token_id == tokenizer.convert_tokens_to_ids("<|assistant|>")
    roles = ["<|system|>", "<|user|>", "<|assistant|>"]
    assert tokenizer.turn_token_ids == tokenizer.convert_tokens_to_ids(roles)
    collator = DataCollatorForSFT(tokenizer, max_length=64, prompt_is_prefix=True)
    samples = []
    for chat in CHATS:
        messages = [{"role": role, "content": content} for role, content in chat]
        encoded = tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
        ids, answers = (torch.tensor([encoded[name]]) for name in ("input_ids", "assistant_masks"))
        turns = tokenizer.answer_start_token_id, tokenizer.turn_token_ids, [tokenizer.eos_token_id]
        found = find_prompts(ids, *turns)
        assert torch.equal(found, number_prompts(1 - answers))
        samples.append({name: encoded[name] for name in ("input_ids", "assistant_masks")})
        batch = collator(samples[-1:])
        assert torch.equal(batch["prefix_mask"], found)
        assert torch.equal(batch["labels"] == -100, found > 0)
        (row,) = pack_dataset(samples[-1:], collator, fixed_prefixes=True)
        assert row["prefix_mask"] == found[0].tolist()
    packed = collator(samples)
    numbers = number_prompts(packed["prefix_mask"], packed["attention_mask"], packed["document_ids"])
    assert torch.equal(packed["prefix_mask"], numbers) and int(numbers.max()) == 2


SCORED = [10, END]
EARLIER = [USER, 11, ANSWER, 12, 13, END, USER, 14, ANSWER]


@pytest.mark.parametrize(
    "sample",
    [
        {"prompt_ids": EARLIER, "completion_ids": SCORED},
        {"input_ids": EARLIER + SCORED, "prompt_length": len(EARLIER)},
        {"input_ids": EARLIER + SCORED, "labels": [-100] * len(EARLIER) + SCORED},
        {"input_ids": EARLIER + SCORED, "completion_mask": [0] * len(EARLIER) + [1, 1]},
    ],
    ids=lambda sample: list(sample)[-1],
)
def test_earlier_answers_that_are_not_scored_are_no_prompts(sample):
    """As `generate()` reads them, in whichever form the sample tells its answer, and packed as well."""
    turns = {name: CHAT[name] for name in ("answer_start_token_id", "turn_token_ids")}
    named = SimpleNamespace(pad_token_id=0, eos_token_id=END, **turns)
    expected = find_prompts(torch.tensor([EARLIER + SCORED]), *turns.values(), [END])
    assert int(expected.max()) == 2
    collator = DataCollatorForSFT(named, max_length=32, prompt_is_prefix=True)
    batch = collator([sample])
    assert torch.equal(batch["prefix_mask"], expected)
    assert batch["labels"][0, -2:].tolist() == SCORED and (batch["labels"][0, :-2] == -100).all()
    for fixed in (False, True):
        assert torch.equal(collator(pack_dataset([sample], collator, fixed_prefixes=fixed))["prefix_mask"], expected)


def test_answers_without_a_chats_tokens_are_no_prompts():
    named = SimpleNamespace(pad_token_id=0, eos_token_id=END, answer_start_token_id=ANSWER, turn_token_ids=[ANSWER])
    collator = DataCollatorForSFT(named, max_length=32, prompt_is_prefix=True)
    batch = collator([{"prompt_ids": [8, 9, 10], "completion_ids": [11, 12]}])
    assert batch["prefix_mask"].tolist() == [[1, 1, 1, 0, 0]]
    with pytest.raises(ValueError, match="give both"):
        DataCollatorForSFT(pad_token_id=0, max_length=32, prompt_is_prefix=True, answer_start_token_id=ANSWER)
    for given in ({"answer_start_token_id": ANSWER}, {"turn_token_ids": [ANSWER]}):
        with pytest.raises(ValueError, match="prompt_is_prefix=True"):
            DataCollatorForSFT(pad_token_id=0, max_length=32, **given)


CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] }}<|im_end|>{% endgeneration %}"
    "{% else %}{{ message['content'] }}<|im_end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
BRACKETS = (
    "{% for message in messages %}{{ '[' + message['role'] + ']' + message['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


def test_tokens_of_turns_are_those_of_the_template(tokenizer):
    other = copy.deepcopy(tokenizer)
    other.add_special_tokens({"extra_special_tokens": ["<|im_start|>", "<|im_end|>", "[user]", "[assistant]"]})
    for template in (CHATML, None):
        other.chat_template = template
        assert other.answer_start_token_id is None and other.turn_token_ids is None
    other.chat_template = BRACKETS
    assert other.answer_start_token_id == other.convert_tokens_to_ids("[assistant]")
    # No token of its own starts a turn of the system there.
    assert other.turn_token_ids == other.convert_tokens_to_ids(["[user]", "[assistant]"])


@pytest.mark.slow
def test_the_command_line_says_where_a_template_has_no_tokens_for_turns(tokenizer, tmp_path):
    other = copy.deepcopy(tokenizer)
    other.add_special_tokens({"extra_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    other.chat_template = CHATML
    other.save_pretrained(tmp_path / "base")
    config = tiny_config(attention_type="prefix", vocab_size=len(other), max_position_embeddings=64)
    MiniLLMForCausalLM(config).save_pretrained(tmp_path / "base")
    one = '{"role": "user", "content": "Hello?"}, {"role": "assistant", "content": "Six."}'
    for turns, said in ((one, False), (f"{one}, {one}", True)):
        (tmp_path / "data.jsonl").write_text(f'{{"messages": [{turns}]}}\n' * 4)
        arguments = ["train", "--model", tmp_path / "base", "--data", tmp_path / "data.jsonl", "--objective", "sft"]
        told = succeed(*arguments, "--out", tmp_path / f"out-{said}", *SHORT[:4], "--max-length", "64")
        assert ("starts answers with no token of their own" in " ".join(told.split())) == said
        assert MiniLLMConfig.from_pretrained(tmp_path / f"out-{said}").answer_start_token_id is None


@torch.no_grad()
def test_generate_takes_numbers_as_forward_does():
    """Neighbouring prompts stay two; ones and zeros are numbered; a number that comes back is refused."""
    model = loud_model(tiny_config(attention_type="prefix"))
    ids = tokens(batch=1, length=8)
    options = {"max_new_tokens": 1, "return_dict_in_generate": True, "output_logits": True, "pad_token_id": 0}
    for given, meant in (("11220333", "11220333"), ("12340555", "12340555"), ("11001001", "11002003")):
        told = model.generate(ids, prefix_mask=rows(given), **options).logits[0]
        assert_close(told, model(ids, prefix_mask=rows(meant)).logits[:, -1].double(), given)
    for wrong in ("12100000", "22100000"):
        with pytest.raises(ValueError, match="comes back"):
            model.generate(ids, prefix_mask=rows(wrong), **options)


def test_an_answer_ends_with_each_token_that_ends_generation():
    model = loud_model(tiny_config(attention_type="prefix", **CHAT))
    model.generation_config.eos_token_id = [END, 9]
    both = loud_model(tiny_config(attention_type="prefix", **{**CHAT, "eos_token_id": [END, 9]}))
    ids = torch.tensor([[USER, 11, ANSWER, 12, 9, 13, 14, USER, 15, ANSWER]])
    assert torch.equal(continued(model, ids), continued(both, ids))


def test_half_of_the_tokens_of_a_chat_is_refused():
    model = loud_model(tiny_config(attention_type="prefix"))
    model.config.answer_start_token_id = ANSWER
    with pytest.raises(ValueError, match="turn_token_ids=None"):
        continued(model, tokens())


def test_a_trained_conversation_is_what_generate_reads(tokenizer):
    """The logits at the second answer, by the collator's mask and in generate()."""
    config = tiny_config(
        attention_type="prefix",
        vocab_size=len(tokenizer),
        eos_token_id=tokenizer.eos_token_id,
        answer_start_token_id=tokenizer.answer_start_token_id,
        turn_token_ids=tokenizer.turn_token_ids,
        max_position_embeddings=64,
    )
    model = loud_model(config)
    messages = [{"role": role, "content": content} for role, content in CHATS[0]]
    encoded = tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
    batch = DataCollatorForSFT(tokenizer, max_length=64, prompt_is_prefix=True)(
        [{name: encoded[name] for name in ("input_ids", "assistant_masks")}]
    )
    prompt = tokenizer.apply_chat_template(
        messages[:3], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    length = prompt["input_ids"].shape[1]
    with torch.no_grad():
        trained = model(batch["input_ids"], prefix_mask=batch["prefix_mask"]).logits[:, length - 1]
    told = model.generate(**prompt, max_new_tokens=1, return_dict_in_generate=True, output_logits=True)
    assert_close(told.logits[0], trained.double(), "first token of the second answer")


@pytest.mark.slow
@pytest.mark.parametrize("objective", ["sft", "prefix"])
def test_the_command_line_names_the_tokens_of_a_chat(objective, tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path / "base")
    config = tiny_config(attention_type="prefix", vocab_size=len(tokenizer), max_position_embeddings=64)
    MiniLLMForCausalLM(config).save_pretrained(tmp_path / "base")
    turns = '{"messages": [{"role": "user", "content": "Hello?"}, {"role": "assistant", "content": "Six."}]}\n'
    (tmp_path / "data.jsonl").write_text(turns * 4)
    (tmp_path / "text.txt").write_text("What is two times three?\nSix.\n\n" * 400)
    data = tmp_path / ("data.jsonl" if objective == "sft" else "text.txt")
    out = tmp_path / "out"
    arguments = ["train", "--model", tmp_path / "base", "--data", data, "--objective", objective, "--out", out]
    succeed(*arguments, *SHORT)
    trained = MiniLLMConfig.from_pretrained(out)
    expected = tokenizer.answer_start_token_id if objective == "sft" else None
    assert trained.answer_start_token_id == expected
    assert trained.turn_token_ids == (tokenizer.turn_token_ids if objective == "sft" else None)
    told = succeed(*arguments[:-1], tmp_path / "adapter", *SHORT, "--lora")
    assert ("answer_start_token_id" in told) == (objective == "sft")


# --- two readings of one text ---


@pytest.fixture
def warnings_of(monkeypatch):
    told = []
    monkeypatch.setattr(minillm.modeling_minillm.logger, "warning_once", lambda message: told.append(message))

    def run(call):
        told.clear()
        with torch.no_grad():
            call()
        return list(told)

    return run


def test_scoring_a_prompt_as_a_causal_model_is_said_once(warnings_of):
    model = model_of("prefix")
    (told,) = warnings_of(lambda: model(tokens()))
    assert "prefix_mask" in told and "prompt_is_prefix=False" in told
    assert warnings_of(lambda: model(tokens(), past_key_values=DynamicCache()))
    assert warnings_of(lambda: model.model(tokens(), attention_mask=torch.ones(2, LENGTH)))


def test_what_is_meant_is_not_warned_of(warnings_of):
    model = model_of("prefix")
    assert not warnings_of(lambda: model(tokens(), prefix_mask=torch.zeros(2, LENGTH, dtype=torch.long)))
    assert not warnings_of(lambda: model(tokens(length=1)))
    assert not warnings_of(lambda: model(tokens(), attention_mask=torch.ones(2, 1, LENGTH, LENGTH).bool()))
    cache = DynamicCache()
    model(tokens(), past_key_values=cache, prefix_mask=torch.ones(2, LENGTH, dtype=torch.long))
    assert not warnings_of(lambda: model(tokens(), past_key_values=cache))
    for options in ({}, {"use_cache": False}, {"num_beams": 2}, {"cache_implementation": "static"}):
        assert not warnings_of(lambda options=options: continued(model, tokens(), **options))
    assert not warnings_of(lambda: continued(model, tokens(batch=1), prompt_lookup_num_tokens=2))
    assert not warnings_of(lambda: continued(model, tokens(batch=1), assistant_model=model_of("prefix-alibi")))
    assert not warnings_of(lambda: torch.compile(model, backend="eager")(tokens()))
    torch.compiler.reset()
    model.config.prompt_is_prefix = False
    assert not warnings_of(lambda: model(tokens()))
    assert not warnings_of(lambda: model_of("causal")(tokens()))


def test_the_two_readings_differ_and_prompt_is_prefix_joins_them():
    ids = torch.randint(0, VOCAB, (1, 8), generator=torch.Generator().manual_seed(1))
    for joined in (False, True):
        model = loud_model(tiny_config(attention_type="prefix", prompt_is_prefix=not joined))
        with torch.no_grad():
            scored = model(ids).logits[:, -1]
        told = model.generate(ids, max_new_tokens=1, return_dict_in_generate=True, output_logits=True, pad_token_id=0)
        assert ((told.logits[0] - scored).abs().max() < 1e-5) == joined
