"""Collators for the stock `Trainer`: causal, prefix and supervised fine-tuning, each with packing.

Each is a `DocumentCollator` with an objective of its own, made of its fields.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from minillm.data.documents import Piece
from minillm.data.row_folder import pack_into
from minillm.training.document_collator import DocumentCollator, Overlong
from minillm.training.objective import Objective
from minillm.training.objective_answers import Answers, AnswersToPrefixes
from minillm.training.objective_next_token import NextToken
from minillm.training.objective_prefix import RandomPrefix
from minillm.training.random_draws import uniform_draw as uniform_draw
from minillm.training.row_settings import row_settings

WINDOW_TOKENS = 4_000_000


@dataclass
class DataCollatorForCausalLM(DocumentCollator):
    """Packs documents into rows for a causal language model; every token but a document's first is scored.

    A sample is a list of token ids or a mapping with `input_ids` and perhaps `attention_mask` (zeros are padding and
    are left out), `labels` (the ids, or -100 where a token is not to be scored) and `document_ids`. A sample with
    `document_ids` is a row already (see `pack_dataset`) and stays one. Fields of other names are not read.

    Called with n samples it returns a dict of int64 tensors [rows, length], rows <= n unless documents are split:
    `input_ids`; `attention_mask`, 1 on tokens and 0 on padding (always at the right); `labels`, -100 at padding and on
    each document's first token (position t-1 predicts labels[t], the model shifts); and with `packing` also
    `document_ids`, 1, 2, ... within a row, and `position_ids`, which begin at 0 in every document (both 0 at padding).

    Args:
        tokenizer: gives `pad_token_id`; a `Trainer` without a processing class saves it beside the model.
        max_length: tokens in a row; needed for `packing`. None takes the longest sample.
        packing: several documents may share a row; the number of rows of a batch then varies. False: one document a
            row.
        pad_token_id: id at padding. None takes the tokenizer's pad token, else its end token.
        padding: "longest": to the longest row of the batch; "max_length": rows of one length throughout.
        pad_to_multiple_of: rows become a multiple of it; it must divide `max_length`.
        overlong: a document beyond `max_length` is split into pieces that count as documents of their own (a last
            token alone takes its predecessor along), loses its end with a logged warning, or raises.
        seed: seed of the random draws of the collators that draw; together with the epoch and the document's ids it
            decides them alone, so that neither the order of samples nor the number of workers matters.

    Raises:
        ValueError: arguments that do not go together; when called, no samples, a sample that is not as described
            (named by its number in the batch), or a batch without one token to score.
    """

    def make_objective(self) -> Objective:
        return NextToken()


@dataclass
class DataCollatorForPrefixLM(DocumentCollator):
    """Packs documents for a prefix language model: a random part at each document's start sees itself in both
    directions, the rest is predicted from left to right (Raffel et al. 2020, section 3.2.1).

    Takes and returns what `DataCollatorForCausalLM` does, and `prefix_mask`, 1 inside the prefix. A prefix token sees
    its successor, so labels are -100 on all of the prefix. A document gets a prefix of at least one token that leaves
    its last scored one; the draw follows from (seed, epoch, the document's ids) alone. Add `SetEpochCallback` for new
    prefixes in each epoch, and pack evaluation data with `pack_dataset(..., fixed_prefixes=True)`.

    Args:
        prefix_fraction: (lowest, highest) part of a document that may become the prefix; drawn uniformly.
    """

    prefix_fraction: tuple[float, float] = (0.0, 1.0)

    def make_objective(self) -> Objective:
        return RandomPrefix(self.prefix_fraction)


@dataclass
class DataCollatorForSFT(DocumentCollator):
    """Packs prompts with their answers for supervised fine-tuning: only the answer is scored.

    A sample tells its answer in one of these ways: `prompt_ids` and `completion_ids`; `input_ids` and `prompt_length`;
    `input_ids` and `assistant_masks` (from `apply_chat_template(..., return_assistant_tokens_mask=True)`; several
    answers may alternate with prompts) or `completion_mask`; `input_ids` and `labels` with -100 outside of the answer.
    The tensors are those of `DataCollatorForCausalLM`, and `prefix_mask` with `prompt_is_prefix`.

    A document beyond `max_length` is truncated with a logged warning (or raises with `overlong="error"`): the prompt
    loses its start, down to half of `max_length`, then the answer its end. So an answer always remains.

    Args:
        prompt_is_prefix: for models with `attention_type="prefix"`: each run of tokens outside of the answers is a
            prompt, which sees itself in both directions; `prefix_mask` is k on the k-th one.
        answer_start_token_id, turn_token_ids: the tokens of a chat, by which answers that are not scored, such as
            earlier ones in a prompt, are told from prompts, as `generate()` tells them; None takes the tokenizer's.
    """

    overlong: Overlong = "truncate"
    prompt_is_prefix: bool = False
    answer_start_token_id: int | None = None
    turn_token_ids: Sequence[int] | None = None

    def make_objective(self) -> Objective:
        for name in ("answer_start_token_id", "turn_token_ids"):
            if getattr(self, name) is not None and not self.prompt_is_prefix:
                raise ValueError(f"`{name}` tells prompts apart, which are marked with `prompt_is_prefix=True` alone")
            if getattr(self, name) is None and self.prompt_is_prefix:
                setattr(self, name, getattr(self.tokenizer, name, None))
        if (self.answer_start_token_id is None) != (self.turn_token_ids is None):
            raise ValueError("give both of `answer_start_token_id` and `turn_token_ids`, or neither")
        if not self.prompt_is_prefix:
            return Answers()
        end = getattr(self.tokenizer, "eos_token_id", None)
        return AnswersToPrefixes(self.answer_start_token_id, self.turn_token_ids or (), end)


def pack_dataset(
    samples: Any,
    collator: DocumentCollator,
    fixed_prefixes: bool = False,
    *,
    folder: str | Path | None = None,
    window_tokens: int | None = None,
) -> Any:
    """Packs a whole data set beforehand, so that the number of rows, and with it the steps of a run, is known.

    Documents without a token to score, empty ones among them, are left out, and a logged warning counts them.

    Args:
        samples: a sequence of samples as `collator` takes them; a `datasets.Dataset` gives one back. With `folder` a
            stream as well: a `datasets.IterableDataset` or another iterable, from its beginning in every call.
        collator: one of the collators here, with `packing`; give the same one to the `Trainer`.
        fixed_prefixes: keep the prefixes of epoch 0 in the rows, whatever the collator's epoch is, now or later: an
            evaluation of unchanged weights then repeats itself.
        folder: write the rows to files there, and return them as `minillm.data.PackedRows`, which reads them from disk
            as they are asked for: data that memory does not hold. After a run that was ended the same call goes on;
            a complete folder is opened at once, if the first samples are those it was packed from. Needs pyarrow.
        window_tokens: with `folder`, read and pack the samples in windows of so many tokens, each into a file of its
            own; None takes 4 million. More takes more memory and leaves less padding.

    Returns:
        Rows of at most `max_length` tokens, each a mapping of lists: `input_ids`, `document_ids`, `labels`, and
        `prefix_mask` with `fixed_prefixes` and a collator that draws or marks prefixes: k on a document's k-th prompt
        and 0 elsewhere, or -1 throughout where the collator is to draw as in epoch 0 (`DataCollatorForGLM`). The
        collator takes a row as one sample. `Trainer` keeps these columns, since the model's forward names them.

    Raises:
        ValueError: no samples, a sample that is not as the collator wants it, nothing to score, a collator without
            `packing`, a stream or `window_tokens` without `folder`, or a folder that holds rows of other settings or
            of another source.
        TypeError: `collator` is no `DocumentCollator`.
        FolderInUse: another process packs into `folder`.
        OSError: the disk is full; another call goes on.
        ImportError: `folder` without pyarrow.
    """
    if not isinstance(collator, DocumentCollator):
        raise TypeError(f"`collator` is a {type(collator).__name__}; needed: a collator of `minillm.training`")
    if not collator.packing:
        raise ValueError("`pack_dataset` needs a collator with `packing=True`")

    def pack(window: Any) -> list[list[Piece]]:
        rows = collator.rows(window, leave_out_unscored=True)
        return [collator.fix_prefixes(row) for row in rows] if fixed_prefixes else rows

    if folder is not None:
        settings = row_settings(collator, fixed_prefixes)
        return pack_into(folder, samples, pack, settings, WINDOW_TOKENS if window_tokens is None else window_tokens)
    if window_tokens is not None:
        raise ValueError(f"`window_tokens` is {window_tokens}, but only packing into a `folder` is done in windows")
    if not hasattr(samples, "__len__"):
        raise ValueError(f"a {type(samples).__name__} is a stream, whose rows need a place: give a `folder`")
    packed = [_row_columns(row) for row in pack(samples)]
    return type(samples).from_list(packed) if hasattr(samples, "from_list") else packed


def _row_columns(row: list[Piece]) -> dict[str, list[int]]:
    columns = {
        "input_ids": [piece.input_ids for piece in row],
        "document_ids": [np.full(len(piece.input_ids), number) for number, piece in enumerate(row, start=1)],
        "labels": [piece.labels for piece in row],
    }
    if row[0].prefix_mask is not None:
        columns["prefix_mask"] = [piece.prefix_mask for piece in row]
    return {name: np.concatenate(parts).tolist() for name, parts in columns.items()}
