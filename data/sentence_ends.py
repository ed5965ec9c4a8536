"""Where sentences end, told from token ids alone."""

from collections.abc import Iterable

import numpy as np
from transformers import PreTrainedTokenizerBase

END_MARKS = ".!?\u2026"
# These end a sentence whatever follows them: Chinese is written without blanks, and a line is a unit of its own.
FIRM_MARKS = "\u3002\uff01\uff1f\n"
CLOSERS = "\"')]}\u201d\u2019\u300d\u300f\uff09\u300b"
BLANKS = (" ", "\t", "\n", "\r", "\u3000", "\u0120", "\u010a", "\u0109", "\u2581")


def id_table(token_ids: Iterable[int], size: int = 0) -> np.ndarray:
    """Boolean [size or more], True at the given ids and False at the last entry; see `look_up`."""
    token_ids = list(token_ids)
    table = np.zeros(max([size, *token_ids]) + 2, bool)
    table[token_ids] = True
    return table


def look_up(table: np.ndarray, ids: np.ndarray) -> np.ndarray:
    """The table's entries at `ids` [n], False beyond its end: boolean [n]."""
    return table[np.minimum(ids, len(table) - 1)]


class SentenceEnds:
    """Finds the last tokens of sentences.

    Each id is decoded by itself, once. A sentence ends with a token whose text ends, apart from closing quotes and
    brackets, in `.`, `!`, `?`, an ellipsis or their Chinese forms, or that holds a line break; more such marks,
    closing signs and white space right behind it belong to it. After a mark that is not Chinese, white space or a
    special token must follow, so that 3.14 and self.name stay whole; a vocabulary that does not tell white space
    (WordPiece) cannot do this. Abbreviations end sentences, and marks that a byte-level tokenizer spells in several
    tokens do not.

    Args:
        tokenizer: any tokenizer of transformers.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        size = max(tokenizer.get_vocab().values()) + 1
        texts = tokenizer.batch_decode([[token_id] for token_id in range(size)], clean_up_tokenization_spaces=False)
        pieces = [piece or "" for piece in tokenizer.convert_ids_to_tokens(list(range(size)))]
        bare = [text.rstrip().rstrip(CLOSERS).rstrip() for text in texts]
        self.special = id_table(special_ids(tokenizer), size)
        self.firm = id_table(_where(text.endswith(tuple(FIRM_MARKS)) for text in bare), size)
        self.firm |= id_table(_where("\n" in text for text in texts), size)
        self.mark = self.firm | id_table(_where(text.endswith(tuple(END_MARKS)) for text in bare), size)
        opens = [piece.startswith(BLANKS) or text[:1].isspace() for piece, text in zip(pieces, texts, strict=True)]
        self.opens = id_table(_where(opens), size)
        self.tells_blanks = any(opens)
        self.ends_blank = id_table(_where(text[-1:].isspace() for text in texts), size)
        self.hangs = id_table(_where(map(_hangs, texts, opens)), size)

    def __call__(self, ids: np.ndarray) -> np.ndarray:
        """Boolean [n] of int64 ids [n]: True where a sentence ends and another token follows."""
        special = look_up(self.special, ids)
        mark, firm, hangs = (look_up(table, ids) & ~special for table in (self.mark, self.firm, self.hangs))
        places = np.arange(len(ids))
        # The token that the marks, closers and white space up to here hang on.
        word = np.maximum.accumulate(np.where(hangs, 0, places))
        marked, firmly = (np.maximum.accumulate(np.where(table, places, -1)) >= word for table in (mark, firm))
        apart = look_up(self.opens, ids)[1:] | look_up(self.ends_blank, ids)[:-1] | special[1:]
        ends = np.zeros(len(ids), bool)
        ends[:-1] = marked[:-1] & ~hangs[1:] & (apart | firmly[:-1] | (not self.tells_blanks))
        return ends


class ListedEnds:
    """Finds the last tokens of sentences by a list of ids, each of which ends one."""

    def __init__(self, token_ids: Iterable[int]) -> None:
        self.ends = id_table(token_ids)

    def __call__(self, ids: np.ndarray) -> np.ndarray:
        """Boolean [n] of int64 ids [n]: True at the listed ids."""
        return look_up(self.ends, ids)


def _hangs(text: str, opens: bool) -> bool:
    """Whether a token belongs to the mark before it. A quote behind a blank does not: it opens something."""
    if not text.strip():
        return text != ""
    return not opens and not text.strip().strip(CLOSERS + END_MARKS + FIRM_MARKS)


def special_ids(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """The ids of all tokens of a tokenizer that are no text."""
    added = getattr(tokenizer, "added_tokens_decoder", {})
    return set(tokenizer.all_special_ids) | {token_id for token_id, token in added.items() if token.special}


def _where(flags: Iterable[bool]) -> list[int]:
    return [token_id for token_id, flag in enumerate(flags) if flag]
