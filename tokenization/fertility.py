"""How well a tokenizer fits a corpus: tokens per character and word of each language, and which tokens lie idle.

"Fertility" is the number of tokens per word (Rust et al. 2021, section 3.2). Beside it stand figures that need no
words, since Chinese has no blanks between them.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from pathlib import PurePosixPath
from typing import Any, NamedTuple

import regex
from transformers import PreTrainedTokenizerFast

from minillm.tokenization.tokenization_minillm import BYTE_PIECES
from minillm.tokenization.vocabulary_extension import piece_text, read_state, text_kind

BUCKETS = ("chinese", "latin", "other", "code")
"""Languages told apart: a document whose name ends like a program's is code; each line of any other one goes by its
letters (`line_bucket`)."""

CODE_SUFFIXES = frozenset(
    f".{suffix}"
    for suffix in (
        "py pyi ipynb c h cc cpp hpp cu java js jsx ts tsx go rs rb php cs swift kt scala sh bash sql lua pl r jl m "
        "html css json yaml yml toml xml"
    ).split()
)
HAN = regex.compile(r"\p{Han}")
LATIN = regex.compile(r"\p{Latin}")
BATCH = 256


class Segment(NamedTuple):
    """Successive lines of one language, which are tokenized together."""

    bucket: str
    text: str


@dataclass
class Counts:
    """What was counted in the text of one language.

    Words are what stands between blanks and holds a letter or digit; each Chinese character is a word of its own.
    `byte_tokens` are tokens that hold a byte alone, or a part of a character.
    """

    tokens: int = 0
    characters: int = 0
    words: int = 0
    bytes: int = 0
    unknown_tokens: int = 0
    byte_tokens: int = 0

    def __add__(self, other: "Counts") -> "Counts":
        return Counts(*(one + two for one, two in zip(asdict(self).values(), asdict(other).values(), strict=True)))

    def rates(self) -> dict[str, float | None]:
        """Quotients; None where the divisor is 0."""
        return {
            "tokens_per_character": ratio(self.tokens, self.characters),
            "tokens_per_word": ratio(self.tokens, self.words),
            "bytes_per_token": ratio(self.bytes, self.tokens),
            "unknown_rate": ratio(self.unknown_tokens, self.tokens),
            "byte_rate": ratio(self.byte_tokens, self.tokens),
        }


@dataclass
class VocabularyUse:
    """How much of a vocabulary a corpus uses.

    Special and added tokens and the pieces of one byte are left out: they stand ready whatever the text is.

    Attributes:
        pieces: number of pieces counted.
        used: pieces that occurred.
        rare: pieces that occurred less than `threshold` times, those that never did included.
        rarest: (id, text, count), the rarest first, among equals the latest; a piece that holds a part of a character
            shows as the vocabulary writes it.
        frequencies: counts of all pieces, falling.
    """

    size: int
    pieces: int
    used: int
    threshold: int
    rare: int
    rarest: list[tuple[int, str, int]]
    frequencies: list[int] = field(repr=False)

    @property
    def never(self) -> int:
        return self.pieces - self.used

    @property
    def share_used(self) -> float | None:
        return ratio(self.used, self.pieces)


@dataclass
class FertilityReport:
    """What `measure_fertility` found; `buckets` holds the languages that occur, in the order of `BUCKETS`."""

    name: str
    buckets: dict[str, Counts]
    vocabulary: VocabularyUse

    @property
    def total(self) -> Counts:
        return sum(self.buckets.values(), Counts())

    def to_dict(self) -> dict[str, Any]:
        """Everything but the curve of frequencies, as JSON can hold it."""
        use = asdict(self.vocabulary)
        use.pop("frequencies")
        buckets = {**self.buckets, "all": self.total}
        return {
            "tokenizer": self.name,
            "buckets": {name: {**asdict(counts), **counts.rates()} for name, counts in buckets.items()},
            "vocabulary": {**use, "never": self.vocabulary.never, "share_used": self.vocabulary.share_used},
        }


def ratio(part: float, whole: float) -> float | None:
    return part / whole if whole else None


def measure_fertility(
    tokenizer: PreTrainedTokenizerFast,
    documents: Iterable[str | tuple[str, str]],
    *,
    name: str = "tokenizer",
    rare_below: int = 5,
    list_rarest: int = 50,
) -> FertilityReport:
    """Tokenizes a corpus, without adding special tokens, and counts.

    Args:
        documents: texts, or pairs (file name, text) as `minillm.training.load_corpus` gives; only names tell code.
        name: how the report calls the tokenizer.
        rare_below: a piece that occurs less often is rare.
        list_rarest: how many of the rarest pieces the report lists.

    Raises:
        TypeError: no fast tokenizer; `documents` is one string, or holds something else than texts and pairs.
        ValueError: a number out of range, or no text at all.
    """
    state = read_state(tokenizer, "tokenizer")
    for option, value, lowest in (("rare_below", rare_below, 1), ("list_rarest", list_rarest, 0)):
        if isinstance(value, bool) or not isinstance(value, int) or value < lowest:
            raise ValueError(f"{option} must be a whole number from {lowest} on, not {value!r}")
    segments = [segment for document in check_documents(documents) for segment in cut_segments(*document)]
    if not segments:
        raise ValueError("the corpus is empty: documents yielded no text")
    pieces = {index: piece for piece, index in tokenizer.get_vocab().items()}
    byte_ids = {index for index, piece in pieces.items() if is_byte_token(piece, text_kind(state))}
    found = {bucket: Counts() for bucket in BUCKETS}
    frequencies: Counter[int] = Counter()
    unknown: Any = tokenizer.unk_token_id
    for start in range(0, len(segments), BATCH):
        batch = segments[start : start + BATCH]
        texts = [segment.text for segment in batch]
        encoded = tokenizer(
            texts, add_special_tokens=False, split_special_tokens=True, return_attention_mask=False, verbose=False
        )["input_ids"]
        for segment, ids in zip(batch, encoded, strict=True):
            frequencies.update(ids)
            found[segment.bucket] += count(segment.text, ids, unknown, byte_ids)
    counted = countable_pieces(tokenizer, pieces, text_kind(state))
    use = vocabulary_use(counted, frequencies, len(pieces), rare_below, list_rarest)
    use.rarest = [(index, piece_text(piece, text_kind(state)) or piece, times) for index, piece, times in use.rarest]
    return FertilityReport(
        name,
        {bucket: counts for bucket, counts in found.items() if counts.characters},
        use,
    )


def check_documents(documents: Any) -> Iterator[tuple[str, str]]:
    if isinstance(documents, (str, bytes)) or not isinstance(documents, Iterable):
        raise TypeError(f"documents must be an iterable of texts, not one {type(documents).__name__}")
    for index, document in enumerate(documents):
        pair = ("", document) if isinstance(document, str) else document
        if not isinstance(pair, tuple) or len(pair) != 2 or not all(isinstance(part, str) for part in pair):
            raise TypeError(f"documents[{index}] must be a text or a pair (file name, text), not {document!r:.80}")
        yield pair


def cut_segments(name: str, text: str) -> list[Segment]:
    """The text in stretches of one language; lines without letters go with the line before them."""
    # A lone file comes in parts called "file.txt#0", "file.txt#1", ...
    if PurePosixPath(name.partition("#")[0]).suffix.lower() in CODE_SUFFIXES:
        return [Segment("code", text)] if text else []
    buckets: list[tuple[str | None, list[str]]] = []
    for line in text.splitlines(keepends=True):
        bucket = line_bucket(line)
        if buckets and bucket in (None, buckets[-1][0]):
            buckets[-1][1].append(line)
        elif buckets and buckets[-1][0] is None:
            buckets[-1] = (bucket, [*buckets[-1][1], line])
        else:
            buckets.append((bucket, [line]))
    return [Segment(bucket or "other", "".join(lines)) for bucket, lines in buckets]


def line_bucket(line: str) -> str | None:
    """The language of a line, by its letters; None without any.

    "other" (kana, Cyrillic, ...) if such letters are at least as many as the Chinese characters and as the Latin
    letters; else "chinese" if there are at least half as many Chinese characters as Latin letters, since a character
    says about as much as a short word; else "latin". Japanese is "other" by its kana.
    """
    scripts = Counter(script(character) for character in line if character.isalpha() or character == "〇")
    if not scripts:
        return None
    chinese, latin, other = (scripts[name] for name in ("chinese", "latin", "other"))
    if other >= max(chinese, latin):
        return "other"
    return "chinese" if 2 * chinese >= latin else "latin"


@lru_cache(maxsize=1 << 16)
def script(letter: str) -> str:
    if HAN.match(letter):
        return "chinese"
    return "latin" if LATIN.match(letter) else "other"


def count_words(text: str) -> int:
    """Chinese characters, and what stands between them and blanks and holds a letter or digit."""
    parts = HAN.sub(" ", text).split()
    return len(HAN.findall(text)) + sum(any(map(str.isalnum, part)) for part in parts)


def count(text: str, ids: Sequence[int], unknown_id: int | None, byte_ids: set[int]) -> Counts:
    return Counts(
        tokens=len(ids),
        characters=len(text),
        words=count_words(text),
        bytes=len(text.encode()),
        unknown_tokens=0 if unknown_id is None else ids.count(unknown_id),
        byte_tokens=sum(index in byte_ids for index in ids),
    )


def is_byte_token(piece: str, kind: str | None) -> bool:
    """Whether a piece holds a byte of byte fallback, or (byte-level BPE) bytes that are no whole characters."""
    if kind != "byte-level":
        return piece in BYTE_PIECES
    return piece_text(piece, kind) is None


def countable_pieces(tokenizer: PreTrainedTokenizerFast, pieces: dict[int, str], kind: str | None) -> dict[int, str]:
    """The vocabulary without special and added tokens and without pieces of one byte."""
    left_out = {*tokenizer.all_special_ids, *tokenizer.get_added_vocab().values()}
    single = (lambda piece: len(piece) == 1) if kind == "byte-level" else BYTE_PIECES.__contains__
    return {index: piece for index, piece in pieces.items() if index not in left_out and not single(piece)}


def vocabulary_use(
    pieces: dict[int, str], frequencies: Counter[int], size: int, rare_below: int, list_rarest: int
) -> VocabularyUse:
    order = sorted(pieces, key=lambda index: (frequencies[index], -index))
    return VocabularyUse(
        size=size,
        pieces=len(pieces),
        used=sum(frequencies[index] > 0 for index in pieces),
        threshold=rare_below,
        rare=sum(frequencies[index] < rare_below for index in pieces),
        rarest=[(index, pieces[index], frequencies[index]) for index in order[:list_rarest]],
        frequencies=[frequencies[index] for index in reversed(order)],
    )
