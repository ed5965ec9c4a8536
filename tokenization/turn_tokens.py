"""Which tokens of a tokenizer start the turns of a chat, read off its chat template."""

from typing import Any

from transformers import PreTrainedTokenizerFast

ROLES = ("system", "user", "assistant")


class TurnTokensMixin(PreTrainedTokenizerFast):
    """`answer_start_token_id` and `turn_token_ids`, as `MiniLLMConfig` takes them."""

    @property
    def answer_start_token_id(self) -> int | None:
        """Id of the special token after which the chat template has an answer begin, such as `<|assistant|>`; None
        without a template, or if it writes something else there than one special token."""
        turn = self._rendered("user", add_generation_prompt=False)
        opened = self._rendered("user", add_generation_prompt=True)
        is_one_token = bool(turn) and opened[:-1] == turn and opened[-1] in self.all_special_ids
        return opened[-1] if is_one_token else None

    @property
    def turn_token_ids(self) -> list[int] | None:
        """Ids of the special tokens with which the chat template starts the turns of its roles; None where
        `answer_start_token_id` is."""
        if self.answer_start_token_id is None:
            return None
        firsts = [self._rendered(role, add_generation_prompt=False)[:1] for role in ROLES]
        return [token for first in firsts for token in first if token in self.all_special_ids]

    def _rendered(self, role: str, add_generation_prompt: bool) -> list[int]:
        """Token ids of an empty message; none if the template refuses it."""
        if self.chat_template is None:
            return []
        message = {"role": role, "content": ""}
        try:
            ids: Any = self.apply_chat_template(
                [message], add_generation_prompt=add_generation_prompt, return_dict=False, tokenize=True
            )
        except Exception:  # A template refuses what it has no place for in ways of its own.
            return []
        return ids
