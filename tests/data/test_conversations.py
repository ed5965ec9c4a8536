"""Conversations as samples: which way tells the answers, what is scored, and what is refused."""

import pytest
from chat_cases import TEMPLATES_OF_TRL, TWO_TURNS, WITH_SYSTEM, chat_tokenizer, end_ids, shown
from tokenizers import processors
from transformers import PreTrainedTokenizerFast

from minillm.data import CHAT_TEMPLATES, ChatEncoder, ConversationError, chat_template
from minillm.tokenization.tokenization_minillm import CHAT_TEMPLATE

CHATML = chat_template("chatml")


def of_trl(name):
    return (TEMPLATES_OF_TRL / f"{name}.jinja").read_text("utf-8")


def encoder(template, ends=None, **options):
    tokenizer = chat_tokenizer(template)
    return ChatEncoder(tokenizer, end_token_ids=end_ids(tokenizer, ends) if ends else end_ids(tokenizer), **options)


def read(template, messages, ends=None, tools=None, **options):
    """The way, and the samples as text."""
    chat = encoder(template, ends, **options)
    samples = chat(messages, tools)
    (way,) = chat.ways
    return way, [shown(chat.tokenizer, sample) for sample in samples]


# By name: what a template of TRL's test bed is, and in which way its answers are told.
WAYS = {
    "llama3": "whole",
    "llama3_1": "whole",
    "llama3_2": "whole",
    "qwen2_5": "whole",
    "qwen3_instruct_2507": "whole",
    "gemma": "whole",
    "cohere": "whole",
    "glm4moe": "whole",
    "lfm2": "whole",
    "qwen3": "rows",
    "qwen3_6": "rows",
    "phi3": "rows",
    "llama3_training": "generation",
    "qwen3_training": "generation",
    "gemma_training": "generation",
    "deepseekv3_training": "generation",
}


@pytest.mark.parametrize("name", WAYS)
def test_the_way_in_which_answers_are_told(name):
    way, samples = read(of_trl(name), TWO_TURNS)
    assert way == WAYS[name]
    assert len(samples) == (2 if way == "rows" else 1)
    scored = [part.split("]]")[0] for sample in samples for part in sample.split("[[")[1:]]
    assert len(scored) == 2 and "In China." in scored[0] and "In Italy, of course." in scored[1]
    assert not any(question in answer for question in ("Peking", "Rome") for answer in scored)


def naive(tokenizer, messages, template, ends):
    """Per answer, the ids of what is rendered before it, of what is rendered with it, and of what is to be learned."""
    render = tokenizer.apply_chat_template
    options = {"chat_template": template, "return_dict": False}
    for number, message in enumerate(messages):
        if message["role"] == "assistant":
            before = render(messages[:number], add_generation_prompt=True, **options)
            upto = render(messages[: number + 1], **options)
            assert upto[: len(before)] == before
            learned = upto[len(before) :]
            while learned[-1] not in ends and not tokenizer.decode(learned[-1:]).strip():
                learned.pop()
            yield before, learned


STABLE = ["llama3", "llama3_2", "qwen2_5", "gemma", "cohere", "lfm2", "glm4moe"]


@pytest.mark.parametrize("messages", [TWO_TURNS, WITH_SYSTEM], ids=["two-turns", "system"])
@pytest.mark.parametrize("name", [*STABLE, *(name for name in CHAT_TEMPLATES if CHAT_TEMPLATES[name].ends)])
def test_masks_are_those_of_a_rendering_of_each_turn_by_itself(name, messages):
    if name == "gemma" and messages is WITH_SYSTEM:
        messages = TWO_TURNS  # It has no place for a system message.
    if name == "bloomz":
        messages = TWO_TURNS[:2]
    template = of_trl(name) if name in STABLE else chat_template(name)
    chat = encoder(template)
    tokenizer, ends = chat.tokenizer, chat.ends
    (sample,) = chat(messages)
    ids, mask = sample["input_ids"], sample["assistant_masks"]
    expected = [0] * len(ids)
    last = sum(message["role"] == "assistant" for message in messages)
    for count, (before, learned) in enumerate(naive(tokenizer, messages, template, ends), 1):
        start, stop = len(before), len(before) + len(learned)
        assert ids[:start] == before and ids[start:stop] == learned
        if learned[-1] not in ends:
            # It stops at what comes next, or at what would come next.
            stop += 1
            assert ids[stop - 1] in ends
        expected[start:stop] = [1] * (stop - start)
        if count == last:
            assert not any(token not in ends and tokenizer.decode([token]).strip() for token in ids[stop:])
    assert mask == expected


@pytest.mark.parametrize("name", ["llama3_training", "qwen3_training", "gemma_training", "deepseekv3_training"])
def test_marked_answers_are_those_of_transformers(name):
    tokenizer = chat_tokenizer(of_trl(name))
    (sample,) = ChatEncoder(tokenizer, end_token_ids=end_ids(tokenizer))(TWO_TURNS)
    expected = tokenizer.apply_chat_template(TWO_TURNS, return_dict=True, return_assistant_tokens_mask=True)
    assert sample == {"input_ids": expected["input_ids"], "assistant_masks": expected["assistant_masks"]}


def test_our_own_template_marks_its_answers():
    way, (told,) = read(CHAT_TEMPLATE, WITH_SYSTEM)
    assert way == "generation" and told == (
        "<|system|>Be brief.<|user|>Where is Peking?<|assistant|>[[In China.</s>]]<|user|>And Rome?<|assistant|>"
        "[[In Italy, of course.</s>]]"
    )


@pytest.mark.parametrize("name", ["chatglm3", "glm-4"])
def test_glm_learns_to_stop_at_the_next_role(name):
    way, (told,) = read(chat_template(name), TWO_TURNS)
    assert way == "whole" and told.count("<|user|>]]") == 2 and told.endswith("In Italy, of course.<|user|>]]")
    # After a call it is the observation that comes, not the user.
    call = [{"type": "function", "function": {"name": "clock", "arguments": {}}}]
    messages = [TWO_TURNS[0], {"role": "assistant", "content": "", "tool_calls": call}]
    messages += [{"role": "tool", "content": "ten"}, {"role": "assistant", "content": "It is ten."}]
    if name == "glm-4":
        way, (told,) = read(chat_template(name), messages)
        assert way == "whole" and told.split("<|assistant|>", 1)[1] == (
            "[[clock\n{}<|observation|>]]\nten<|assistant|>[[\nIt is ten.<|user|>]]"
        )
        assert read(chat_template(name), messages[:2])[1][0].endswith("<|assistant|>[[clock\n{}<|observation|>]]")
    else:
        with pytest.raises(ConversationError, match="no place for tool calls"):
            read(chat_template(name), messages)


def test_glm_learns_to_stop_where_each_answer_has_a_row():
    """GLM-4.5 takes the thoughts of an answer out once the user asks on."""
    thought = [
        {**one, "content": f"<think>Hm.</think>{one['content']}"} if n % 2 else one for n, one in enumerate(TWO_TURNS)
    ]
    way, (first, second) = read(of_trl("glm4moe"), thought)
    assert way == "rows" and first.endswith("<think>Hm.</think>\nIn China.<|user|>]]")
    assert "<think></think>\nIn China.<|user|>" in second and second.endswith("In Italy, of course.<|user|>]]")


@pytest.mark.parametrize("name", [name for name in CHAT_TEMPLATES if not CHAT_TEMPLATES[name].ends])
def test_a_template_without_ends_gets_a_row_and_an_end_for_each_answer(name):
    way, (first, second) = read(chat_template(name), TWO_TURNS)
    assert way == "rows"
    assert first.endswith("[[In China.</s>]]") and second.endswith("[[In Italy, of course.</s>]]")
    assert second.count("[[") == 1 and "In China." in second and second.count("</s>") == 1


END_OUTSIDE = CHATML.replace(
    '~ message.content ~ "<|im_end|>\\n" -}}',
    '-}}{%- if message.role == "assistant" -%}{% generation %}{{- message.content -}}{% endgeneration %}'
    '{%- else -%}{{- message.content -}}{%- endif -%}{{- "<|im_end|>\\n" -}}',
)


def test_an_end_behind_a_marked_answer_is_scored_too():
    way, (told,) = read(END_OUTSIDE, TWO_TURNS)
    assert way == "generation" and told.count("<|im_end|>]]\n") == 2


def test_an_end_that_generate_does_not_know_is_told():
    chat = encoder(CHATML, ends="</s>")
    (sample,) = chat(TWO_TURNS)
    assert shown(chat.tokenizer, sample).count("<|im_end|>]]\n") == 2
    assert chat.other_ends == {"<|im_end|>": 2}
    (line,) = [line for line in chat.report() if "does not stop" in line]
    assert "2 answers end with <|im_end|>" in line and "eos_token_id in generation_config.json" in line


def test_ends_are_the_tokenizers_by_default_and_needed():
    tokenizer = chat_tokenizer(chat_template("llama-2"))
    assert ChatEncoder(tokenizer).ends == {tokenizer.eos_token_id}
    tokenizer.eos_token = None
    with pytest.raises(ConversationError, match="names a token that ends a turn"):
        ChatEncoder(tokenizer)


def test_a_start_that_differs_is_refused_with_the_first_difference():
    with pytest.raises(ConversationError) as refused:
        read(of_trl("deepseekv3"), TWO_TURNS, name="the chat template deep.jinja")
    told = str(refused.value)
    start = "<s><｜User｜>Where is Peking?<｜Assistant｜>"
    assert "the chat template deep.jinja writes the start of answer 1 in two ways" in told
    assert f"from character {len(start)} on '<think>\\n' before the answer is there, 'In China." in told
    assert "--training-template" in told
    # The training variant of the same template reads them.
    assert read(of_trl("deepseekv3_training"), TWO_TURNS)[0] == "generation"


MOVED_SYSTEM = """{{- bos_token -}}{%- set ns = namespace(last=0) -%}{%- for message in messages -%}
{%- if message.role == "user" -%}{%- set ns.last = loop.index0 -%}{%- endif -%}{%- endfor -%}
{%- for message in messages -%}{%- if message.role == "user" -%}{{- "[INST] " -}}
{%- if loop.index0 == ns.last and messages[0].role == "system" -%}{{- messages[0].content ~ "\n\n" -}}{%- endif -%}
{{- message.content ~ "[/INST]" -}}{%- elif message.role == "assistant" -%}{{- " " ~ message.content ~ eos_token -}}
{%- endif -%}{%- endfor -%}"""


def test_a_system_message_that_moves_takes_a_row_for_each_answer():
    """As Mistral's third template has it: the system message stands in the last turn of the user."""
    assert read(MOVED_SYSTEM, TWO_TURNS)[0] == "whole"
    assert read(MOVED_SYSTEM, WITH_SYSTEM) == (
        "rows",
        [
            "<s>[INST] Be brief.\n\nWhere is Peking?[/INST][[ In China.</s>]]",
            "<s>[INST] Where is Peking?[/INST] In China.</s>[INST] Be brief.\n\nAnd Rome?[/INST]"
            "[[ In Italy, of course.</s>]]",
        ],
    )


BLANK_BEFORE = MOVED_SYSTEM.replace('"[/INST]"', '"[/INST] "').replace('" " ~ message.content', "message.content")


def test_a_token_across_a_border_is_refused():
    with pytest.raises(
        ConversationError, match=r"the token ' In' stands across the border of an answer, before 'In Chi"
    ):
        read(BLANK_BEFORE, TWO_TURNS)
    # Apart they are what `generate()` gets and gives.
    _, (told,) = read(BLANK_BEFORE, TWO_TURNS, apart=True)
    assert told.startswith("<s>[INST] Where is Peking?[/INST] [[In China.</s>]][INST] And")


def test_blanks_that_a_byte_level_tokenizer_hides_are_seen():
    """Its post-processor takes a blank out of a token's place: the border would seem to stand before the token."""
    tokenizer = chat_tokenizer(BLANK_BEFORE)
    tokenizer.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    assert tokenizer("] In", return_offsets_mapping=True)["offset_mapping"][-1] == (2, 4)
    with pytest.raises(ConversationError, match="the token ' In' stands across"):
        ChatEncoder(tokenizer)(TWO_TURNS)


LITERAL = "a<|im_end|>\n<|im_start|>system</s> b"


@pytest.mark.parametrize(
    "template", [CHATML, of_trl("qwen3"), CHAT_TEMPLATE, chat_template("chatglm2")], ids=str.__len__
)
def test_special_tokens_in_messages_are_text_unless_asked_otherwise(template):
    tokenizer = chat_tokenizer(template)
    messages = [{"role": "user", "content": LITERAL}, {"role": "assistant", "content": LITERAL}]
    special = set(end_ids(tokenizer, "<|im_end|> <|im_start|> </s>"))
    counts = {}
    for read_them in (False, True):
        chat = ChatEncoder(tokenizer, end_token_ids=end_ids(tokenizer), special_tokens_in_text=read_them)
        (sample,) = chat(messages)
        assert tokenizer.decode(sample["input_ids"]).count(LITERAL) == 2
        counts[read_them] = sum(token in special for token in sample["input_ids"])
        stock = tokenizer.apply_chat_template(messages, return_dict=False, special_tokens_in_content=read_them)
        assert sample["input_ids"][: len(stock)] == stock
    assert counts[True] == counts[False] + 2 * 3


TOOLS = [{"type": "function", "function": {"name": "clock", "parameters": {"type": "object", "properties": {}}}}]


def test_tools_are_rendered_where_the_template_takes_them_and_never_scored():
    call = [{"type": "function", "function": {"name": "clock", "arguments": {"zone": "Rome"}}}]
    messages = [TWO_TURNS[0], {"role": "assistant", "content": "", "tool_calls": call}]
    messages += [{"role": "tool", "content": "It is ten."}, {"role": "assistant", "content": "Ten."}]
    chat = encoder(of_trl("qwen2_5"))
    (sample,) = chat(messages, TOOLS)
    told = shown(chat.tokenizer, sample)
    assert told.count("[[") == 2 and '"name": "clock", "parameters"' in told.split("[[")[0]
    assert '"arguments": {"zone": "Rome"}' in told.split("[[")[1].split("]]")[0]
    assert "It is ten." in told.split("]]")[1].split("[[")[0] and told.endswith("[[Ten.<|im_end|>]]\n")
    assert chat.without_tools == 0
    # A template that passes over them is told of; one that refuses them says so itself.
    chat = encoder(of_trl("gemma"))
    chat(TWO_TURNS, TOOLS)
    assert chat.without_tools == 1 and "1 conversation without tools: the chat template" in chat.report()[-1]
    with pytest.raises(ConversationError, match="ChatML has no place for tools"):
        encoder(CHATML)(TWO_TURNS, TOOLS)


def test_what_a_template_leaves_out_is_refused():
    of_parts = of_trl("smolvlm")
    with pytest.raises(ConversationError, match="leaves out the content of message 2"):
        read(of_parts, TWO_TURNS)
    call = [{"type": "function", "function": {"name": "clock", "arguments": {}}}]
    messages = [TWO_TURNS[0], {"role": "assistant", "content": "Well.", "tool_calls": call}]
    with pytest.raises(ConversationError, match="no place for the call of 'clock' in message 2"):
        read(of_trl("llama3"), messages)


@pytest.mark.parametrize(
    ("messages", "words"),
    [
        (TWO_TURNS[:1], "no message of the assistant to learn"),
        (TWO_TURNS[1:], "refuses the messages|begins with an answer"),
        ([{"role": "user", "content": "a"}, {"role": "user", "content": "b"}], "by turns"),
    ],
    ids=["no-answer", "answer-first", "no-turns"],
)
def test_conversations_that_cannot_be_read(messages, words):
    with pytest.raises(ConversationError, match=words):
        read(chat_template("llama-2"), messages)
    if messages == TWO_TURNS[1:]:
        with pytest.raises(ConversationError, match="begins with an answer"):
            read(CHATML, messages)


def test_a_template_and_a_fast_tokenizer_are_needed():
    with pytest.raises(ConversationError, match=r"no chat template.*--training-template"):
        ChatEncoder(chat_tokenizer())
    with pytest.raises(TypeError, match="no fast tokenizer"):
        ChatEncoder(object())
    bare = PreTrainedTokenizerFast(tokenizer_object=chat_tokenizer().backend_tokenizer, eos_token="</s>")
    assert ChatEncoder(bare, CHATML)(TWO_TURNS)


def test_a_whole_conversation_as_text_ends_with_an_end():
    for name in ("chatglm2", "glm-4", "llama-2", "chatml"):
        chat = encoder(chat_template(name))
        ids = chat.as_text(TWO_TURNS)["input_ids"]
        assert ids[-1] in chat.ends
        rendered = chat.tokenizer.apply_chat_template(TWO_TURNS, return_dict=False)
        assert ids[: len(rendered)] == rendered[: len(ids)]
