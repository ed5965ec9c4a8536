"""The chat template and its mask of the assistant's tokens."""

import pytest
from jinja2 import TemplateError

from minillm.tokenization.tokenization_minillm import MiniLLMTokenizer

TEXTS = ["Hello there, be brief and say goodbye. <0x41>", "你好，再见！今天天气很好。"] * 20
CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "你好 \n"},
    {"role": "assistant", "content": " \n Hello\n😀\u2581"},
    {"role": "user", "content": ""},
    {"role": "assistant", "content": "<0x41> 再见"},
    {"role": "user", "content": "Bye"},
    {"role": "assistant", "content": ""},
]


def encode_by_hand(tokenizer, chat):
    """Turn by turn: the role's token, the content's own tokens, and the end token after an assistant's."""
    ids, mask = [], []
    for message in chat:
        content = tokenizer.encode(message["content"])
        assistant = message["role"] == "assistant"
        turn = content + [tokenizer.eos_token_id] * assistant
        ids += [tokenizer.convert_tokens_to_ids(f"<|{message['role']}|>"), *turn]
        mask += [0, *[int(assistant)] * len(turn)]
    return ids, mask


def test_mask_marks_exactly_the_assistants_tokens(tokenizer):
    encoded = tokenizer.apply_chat_template(CHAT, return_dict=True, return_assistant_tokens_mask=True)
    assert (encoded["input_ids"], encoded["assistant_masks"]) == encode_by_hand(tokenizer, CHAT)


def test_mask_written_out(tokenizers):
    chat = [{"role": "user", "content": "a1"}, {"role": "assistant", "content": "2b"}]
    encoded = tokenizers["byte_bpe"].apply_chat_template(chat, return_dict=True, return_assistant_tokens_mask=True)
    tokens = tokenizers["byte_bpe"].convert_ids_to_tokens(encoded["input_ids"])
    assert tokens == ["<|user|>", "a", "1", "<|assistant|>", "2", "b", "<|endoftext|>"]
    assert encoded["assistant_masks"] == [0, 0, 0, 0, 1, 1, 1]


@pytest.mark.parametrize("side", ["right", "left"])
def test_mask_of_a_padded_batch(tokenizer, side):
    chats = [CHAT[:3], CHAT]
    batch = tokenizer.apply_chat_template(
        chats,
        return_dict=True,
        return_assistant_tokens_mask=True,
        padding=True,
        tokenizer_kwargs={"padding_side": side},
    )
    (short, mask), (long, _) = (encode_by_hand(tokenizer, chat) for chat in chats)
    gap = len(long) - len(short)
    before, after = (gap, 0) if side == "left" else (0, gap)
    assert batch["input_ids"][0] == [0] * before + short + [0] * after
    assert batch["assistant_masks"][0] == [0] * before + mask + [0] * after


def test_earlier_turns_keep_their_tokens(tokenizer):
    whole = tokenizer.apply_chat_template(CHAT, return_dict=False)
    for turns in range(1, len(CHAT)):
        ids = tokenizer.apply_chat_template(CHAT[:turns], return_dict=False)
        assert whole[: len(ids)] == ids
        if CHAT[turns]["role"] == "assistant":
            prompt = tokenizer.apply_chat_template(CHAT[:turns], return_dict=False, add_generation_prompt=True)
            assert whole[: len(prompt)] == prompt == [*ids, tokenizer.convert_tokens_to_ids("<|assistant|>")]


def test_final_message_can_be_continued(tokenizer):
    text = tokenizer.apply_chat_template(CHAT[:5], tokenize=False, continue_final_message=True)
    assert text.endswith("<|assistant|><0x41> 再见")


def test_content_may_be_a_list_of_texts(tokenizer):
    parts = [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo"}]
    text = tokenizer.apply_chat_template([{"role": "user", "content": parts}], tokenize=False)
    assert text == "<|user|>Hello"


def test_template_uses_only_tokens_of_the_vocabulary(tokenizer):
    encoded = tokenizer.apply_chat_template(CHAT, return_dict=True, add_generation_prompt=True)["input_ids"]
    assert {"<|system|>", "<|user|>", "<|assistant|>", "<|endoftext|>"} <= set(
        tokenizer.convert_ids_to_tokens(encoded)
    )


def test_template_follows_a_changed_end_token():
    tokenizer = MiniLLMTokenizer.train_from_iterator(
        TEXTS, vocab_size=300, special_tokens={"eos_token": "</s>"}, show_progress=False
    )
    chat = [{"role": "assistant", "content": "hi"}]
    assert tokenizer.apply_chat_template(chat, tokenize=False) == "<|assistant|>hi</s>"
    assert tokenizer.apply_chat_template(chat, return_dict=False)[-1] == tokenizer.eos_token_id == 2


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        ({"role": "robot", "content": "hi"}, "unknown role 'robot'"),
        ({"role": "user"}, "content of a message"),
        ({"role": "user", "content": None}, "content of a message"),
        ({"role": "user", "content": [{"type": "image", "url": "x"}]}, "content of a message"),
        ({"role": "assistant", "content": "", "tool_calls": [{"name": "f"}]}, "no place for tool calls"),
    ],
    ids=["role", "no-content", "null-content", "image", "tool-calls"],
)
def test_messages_without_a_meaning_are_refused(tokenizers, message, reason):
    with pytest.raises(TemplateError, match=reason):
        tokenizers["byte_bpe"].apply_chat_template([message])


def test_tools_are_refused(tokenizers):
    tool = {"type": "function", "function": {"name": "f", "description": "d", "parameters": {"type": "object"}}}
    with pytest.raises(TemplateError, match="no place for tools"):
        tokenizers["byte_bpe"].apply_chat_template(CHAT, tools=[tool])


def test_trl_trains_on_the_assistants_tokens(tokenizers, tmp_path):
    from datasets import Dataset
    from transformers import LlamaConfig, LlamaForCausalLM
    from trl import SFTConfig, SFTTrainer
    from trl.chat_template_utils import get_training_chat_template, is_chat_template_stop_token_trained

    tokenizer = tokenizers["byte_bpe"]
    assert get_training_chat_template(tokenizer) is None
    assert is_chat_template_stop_token_trained(tokenizer)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), pad_token_id=0, **sizes))
    arguments = SFTConfig(
        output_dir=str(tmp_path), assistant_only_loss=True, max_steps=1, report_to=[], use_cpu=True, bf16=False
    )
    trainer = SFTTrainer(
        model, args=arguments, train_dataset=Dataset.from_list([{"messages": CHAT}]), processing_class=tokenizer
    )
    batch = next(iter(trainer.get_train_dataloader()))
    ids, mask = encode_by_hand(tokenizer, CHAT)
    assert batch["input_ids"][0].tolist() == ids
    assert batch["labels"][0].tolist() == [token if kept else -100 for token, kept in zip(ids, mask, strict=True)]
