"""More pieces for a trained tokenizer, as Chinese-LLaMA and Ziya gave LLaMA's: old ids keep their meaning.

Cui et al. 2023 (arXiv 2304.08177, section 2.1) train a second tokenizer on Chinese text and merge its pieces into
LLaMA's, 32,000 of them becoming 49,953. Here the pieces come from such a tokenizer, or are learned from text.
"""

import json
import tempfile
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from transformers.utils import logging

from minillm.tokenization.bpe_growth import BPEGrowth, MergeLearner
from minillm.tokenization.tokenization_minillm import BYTE_PIECES, SPACE
from minillm.tokenization.training_text import Corpus

logger = logging.get_logger(__name__)

# Where pieces may be learned in tokenizers that do not cut text before the model, as LLaMA's: SentencePiece's rules
# (blanks begin a piece, scripts, digits and signs do not mix).
PIECES = (
    rf"{SPACE}?\p{{Han}}+|{SPACE}?[[\p{{L}}\p{{M}}]&&[^\p{{Han}}]]+|\p{{N}}|{SPACE}?[^\s{SPACE}\p{{L}}\p{{M}}\p{{N}}]+"
    rf"|{SPACE}+|\s+"
)
EXTENDABLE = ("byte-level BPE", "U+2581 BPE", "U+2581 Unigram")
# By how much a new Unigram piece beats the pieces that spelled it, in nats.
MARGIN = 1e-3


def extend_vocabulary(
    tokenizer: PreTrainedTokenizerFast,
    texts: Iterable[str | Sequence[str]] | None = None,
    *,
    pieces_from: PreTrainedTokenizerFast | None = None,
    num_new_tokens: int | None = None,
    min_frequency: int = 2,
) -> PreTrainedTokenizerFast:
    """A copy of a tokenizer, of the same class, with new pieces; give either `texts` or `pieces_from`.

    For byte-level BPE (GPT-2, Llama 3), BPE with U+2581 for blanks (LLaMA, with or without byte fallback) and Unigram.

    Guaranteed for every text, as long as the old tokenizer does not drop characters:

    - Old tokens, special and added ones included, keep their ids; new ids follow the highest one.
    - Decoding gives what the old tokenizer's decoding gave.
    - BPE: put for each new id the old ids that spell it (`spell_new_tokens`), and the old encoding stands there, token
      by token. So a text in which no new piece occurs is encoded as before, and none gets longer.
    - Unigram: a text in which no new piece occurs, not even across old tokens, is encoded as before.
    - Each new piece, encoded by itself, is one token.

    From texts, BPE learns on from the pieces it has (Sennrich et al. 2016, section 3.2): pairs of pieces are joined
    and missing characters added, each time what saves most tokens. Unigram trains a second tokenizer. From another
    tokenizer come its pieces in the order of its ids (BPE) or scores (Unigram); those that no text can lead to under
    the old tokenizer's rules (a number, where it cuts digits apart) are left out. BPE also adds the pieces on the way
    to one, where old merges have cut it differently.

    Args:
        tokenizer: the tokenizer to extend; it is not changed.
        texts: strings or lists of strings to learn pieces from; read once.
        pieces_from: another tokenizer of the same kind.
        num_new_tokens: number of new tokens; may be left out with `pieces_from`: all its pieces. There may be fewer of
            them (a warning says so).
        min_frequency: how often a piece must occur in `texts` to be added; for BPE.

    Raises:
        TypeError: something that is no fast tokenizer; `texts` is one string, or yields something else than strings.
        ValueError: both or none of `texts` and `pieces_from`, numbers out of range, WordPiece and other models whose
            pieces are neither byte-level nor written with U+2581, tokenizers of different kinds, an empty corpus.
    """
    state = read_state(tokenizer, "tokenizer")
    check_arguments(state, texts, pieces_from, num_new_tokens, min_frequency)
    # No None is left where the type checker fears one: `check_arguments` has seen to that.
    pin_added_tokens(state)
    backend = Tokenizer.from_str(json.dumps(state))
    if state["model"]["type"] == "Unigram":
        other: Any = pieces_from
        if texts is not None:
            other = train_unigram(tokenizer, Corpus(texts), num_new_tokens)  # pyright: ignore[reportArgumentType]
        number = add_unigram_pieces(state, backend, scored_pieces(other), num_new_tokens)
    else:
        growth = start_growth(state, backend)
        if texts is not None:
            words = count_words(backend, Corpus(texts), own_cuts=text_kind(state) == "byte-level")
            MergeLearner(growth, words).learn(num_new_tokens, min_frequency)  # pyright: ignore[reportArgumentType]
        else:
            pieces = own_pieces(pieces_from)  # pyright: ignore[reportArgumentType]
            take_pieces(growth, backend, pieces, num_new_tokens, text_kind(state))
        number = add_bpe_pieces(state, growth)
    if num_new_tokens is not None and number < num_new_tokens:
        source = "The corpus yields" if texts is not None else "The other tokenizer yields"
        logger.warning(f"{source} only {number} new tokens of the {num_new_tokens} that num_new_tokens asks for.")
    return rebuild(tokenizer, state)


def read_state(tokenizer: Any, name: str) -> dict[str, Any]:
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise TypeError(f"{name} must be a fast tokenizer (one with a tokenizer.json), not {type(tokenizer).__name__}")
    return json.loads(tokenizer.backend_tokenizer.to_str())


def text_kind(state: dict[str, Any]) -> str | None:
    """How blanks and rare characters are written in the vocabulary: "byte-level", "U+2581", or None."""
    parts = json.dumps([state["normalizer"], state["pre_tokenizer"], state["decoder"]], ensure_ascii=False)
    if '"type": "ByteLevel"' in parts:
        return "byte-level"
    return "U+2581" if SPACE in parts else None


def kind_of(state: dict[str, Any]) -> str:
    return f"{text_kind(state) or 'other'} {state['model']['type']}"


def check_arguments(
    state: dict[str, Any], texts: Any, pieces_from: Any, num_new_tokens: int | None, min_frequency: int
) -> None:
    model = state["model"]
    if kind_of(state) not in EXTENDABLE:
        raise ValueError(
            f"a tokenizer of the kind {kind_of(state)} cannot be extended; these can: {', '.join(EXTENDABLE)}"
        )
    if model.get("continuing_subword_prefix") or model.get("end_of_word_suffix"):
        raise ValueError("a BPE with continuing_subword_prefix or end_of_word_suffix cannot be extended")
    if (texts is None) == (pieces_from is None):
        raise ValueError("give exactly one of texts and pieces_from")
    if num_new_tokens is None and texts is not None:
        raise ValueError("num_new_tokens is missing: how many tokens to learn from texts")
    for name, value in (("num_new_tokens", num_new_tokens), ("min_frequency", min_frequency)):
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            raise ValueError(f"{name} must be a whole number from 1 on, not {value!r}")
    if pieces_from is not None:
        kinds = [kind_of(state), kind_of(read_state(pieces_from, "pieces_from"))]
        if kinds[0] != kinds[1]:
            raise ValueError(
                f"tokenizer is of the kind {kinds[0]}, pieces_from of the kind {kinds[1]}: they must agree"
            )


def pin_added_tokens(state: dict[str, Any]) -> None:
    """Writes added tokens beyond the model's vocabulary into it, since their ids would else move behind new pieces.

    Raises:
        ValueError: ids with a gap in a Unigram model, whose ids are places in a list.
    """
    vocabulary = state["model"]["vocab"]
    for token in sorted(state["added_tokens"], key=lambda token: token["id"]):
        if isinstance(vocabulary, dict):
            vocabulary.setdefault(token["content"], token["id"])
        elif token["id"] == len(vocabulary):
            # A score under which no text is ever spelled with it: added tokens are cut out before.
            vocabulary.append([token["content"], min(score for _, score in vocabulary)])
        elif token["id"] > len(vocabulary):
            raise ValueError(f"added token {token['content']!r} has the id {token['id']}, after a gap: it would move")


def start_growth(state: dict[str, Any], backend: Tokenizer) -> BPEGrowth:
    # Dropout would make every encoding another one.
    fixed = Tokenizer.from_str(json.dumps({**state, "model": {**state["model"], "dropout": None}})).model
    return BPEGrowth(
        lambda run: [token.value for token in fixed.tokenize(run)],
        state["model"]["vocab"],
        state["model"]["byte_fallback"],
    )


def split_words(backend: Tokenizer, text: str) -> list[str]:
    """What the model gets to see of a text: no piece reaches across two of these words."""
    if backend.normalizer is not None:
        text = backend.normalizer.normalize_str(text)
    if backend.pre_tokenizer is None:
        return [text] if text else []
    return [word for word, _ in backend.pre_tokenizer.pre_tokenize_str(text)]


def count_words(backend: Tokenizer, corpus: Corpus, own_cuts: bool) -> Counter[str]:
    """How often each word occurs, in the order of first occurrence.

    Args:
        own_cuts: the tokenizer cuts words by itself; otherwise its words are cut by SentencePiece's rules.
    """
    words: Counter[str] = Counter()
    cut = pre_tokenizers.Split(Regex(PIECES), "isolated")
    for text in corpus:
        found = split_words(backend, text)
        words.update(found if own_cuts else (part for word in found for part, _ in cut.pre_tokenize_str(word)))
    check_not_empty(corpus)
    return words


def check_not_empty(corpus: Corpus) -> None:
    if not any(not character.isspace() for character in corpus.characters):
        raise ValueError("the corpus is empty: texts yielded no text, or nothing but white space")


def own_pieces(tokenizer: PreTrainedTokenizerFast) -> list[str]:
    """A tokenizer's pieces by id, without added tokens and byte pieces."""
    vocabulary = tokenizer.get_vocab()
    unknown: Any = tokenizer.unk_token
    left_out = {*tokenizer.get_added_vocab(), *BYTE_PIECES, unknown}
    return [piece for piece in sorted(vocabulary, key=vocabulary.__getitem__) if piece not in left_out]


def piece_text(piece: str, kind: str | None) -> str | None:
    """The text that a piece stands for; None for one that holds a part of a character."""
    if kind != "byte-level":
        return piece.replace(SPACE, " ")
    text = decoders.ByteLevel().decode([piece])
    return None if "\ufffd" in text else text


def take_pieces(
    growth: BPEGrowth, backend: Tokenizer, pieces: Iterable[str], limit: int | None, kind: str | None
) -> None:
    for piece in pieces:
        room = len(growth.taken) + 1 if limit is None else limit - len(growth.pieces)
        if room <= 0:
            return
        text = piece_text(piece, kind)
        if piece in growth.taken or (text is not None and not occurs(backend, piece, text)):
            continue
        growth.reach(piece, room)


def occurs(backend: Tokenizer, piece: str, text: str) -> bool:
    """Whether the tokenizer's rules leave a piece whole."""
    return any(piece in word for word in split_words(backend, text))


def add_bpe_pieces(state: dict[str, Any], growth: BPEGrowth) -> int:
    vocabulary = state["model"]["vocab"]
    first = max(vocabulary.values()) + 1
    vocabulary.update({piece: first + index for index, piece in enumerate(growth.pieces)})
    state["model"]["merges"] += [list(merge) for merge in growth.ranks]
    return len(growth.pieces)


def train_unigram(tokenizer: PreTrainedTokenizerFast, corpus: Corpus, number: int) -> PreTrainedTokenizerFast:
    """A second tokenizer with the same rules. Twice as large as needed, since the first one has some of its pieces."""
    texts = list(corpus)
    check_not_empty(corpus)
    size = 2 * number + len(tokenizer.get_added_vocab()) + len(BYTE_PIECES) + len(corpus.characters)
    return tokenizer.train_new_from_iterator(texts, size, show_progress=False)


def scored_pieces(tokenizer: PreTrainedTokenizerFast) -> list[tuple[str, float]]:
    """A Unigram tokenizer's pieces with their log-probabilities, the likeliest first."""
    scores = dict(json.loads(tokenizer.backend_tokenizer.to_str())["model"]["vocab"])
    return sorted(((piece, scores[piece]) for piece in own_pieces(tokenizer)), key=lambda item: (-item[1], item[0]))


def add_unigram_pieces(
    state: dict[str, Any], backend: Tokenizer, pieces: Iterable[tuple[str, float]], limit: int | None
) -> int:
    """Adds pieces with scores that make each beat all that spelled it."""
    vocabulary = state["model"]["vocab"]
    scores = dict(vocabulary)
    lowest = min(scores.values())
    chosen: list[tuple[str, float]] = []
    for piece, score in pieces:
        text = piece_text(piece, text_kind(state))
        if piece not in scores and text is not None and occurs(backend, piece, text):
            chosen.append((piece, score))
        if len(chosen) == limit:
            break
    # Shorter ones first, so that what spells a piece has its final score.
    for piece, score in sorted(chosen, key=lambda item: len(item[0])):
        scores[piece] = max(score, lowest, best_spelling(piece, scores, lowest) + MARGIN)
    vocabulary += [[piece, scores[piece]] for piece, _ in chosen]
    return len(chosen)


def best_spelling(text: str, scores: dict[str, float], lowest: float) -> float:
    """Score of the likeliest spelling (Kudo 2018, section 3.2); an unknown character costs what the back end says."""
    best = [0.0]
    for end in range(1, len(text) + 1):
        ways = [best[start] + scores[text[start:end]] for start in range(end) if text[start:end] in scores]
        if text[end - 1] not in scores:
            ways.append(best[end - 1] + lowest - 10.0)
        best.append(max(ways))
    return best[-1]


def rebuild(tokenizer: PreTrainedTokenizerFast, state: dict[str, Any]) -> PreTrainedTokenizerFast:
    """The tokenizer with another back end, by way of its files: what is returned is what a user will load."""
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        (Path(folder) / "tokenizer.json").write_text(json.dumps(state, ensure_ascii=False), "utf-8")
        extended = type(tokenizer).from_pretrained(folder)
    extended.name_or_path = tokenizer.name_or_path
    return extended


def spell_new_tokens(old: PreTrainedTokenizerFast, new: PreTrainedTokenizerFast) -> dict[int, list[int]]:
    """For each token that `new` has beyond `old`, by id: the ids of the old tokens that spelled it.

    Raises:
        TypeError: no fast tokenizers.
        ValueError: `new` is no extension of `old`: a token is missing or has another id.
    """
    read_state(old, "old_tokenizer")
    read_state(new, "new_tokenizer")
    before, after = old.get_vocab(), new.get_vocab()
    for token, index in before.items():
        if after.get(token) != index:
            raise ValueError(
                f"the new tokenizer does not extend the old one: {token!r} had the id {index}, now {after.get(token)}"
            )
    added = new.get_added_vocab()
    return {
        index: spell(old, token, as_text=token in added)
        for token, index in sorted(after.items(), key=lambda item: item[1])
        if token not in before
    }


def spell(tokenizer: PreTrainedTokenizerFast, token: str, as_text: bool) -> list[int]:
    if as_text:
        return tokenizer.encode(token, add_special_tokens=False)
    return [part.id for part in tokenizer.backend_tokenizer.model.tokenize(token)]
