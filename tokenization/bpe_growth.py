"""Growing a BPE model: merges learned from where an existing tokenizer stops.

All of it rests on one rule: a new merge comes after all old ones and makes a piece that did not exist. Then encoding
first does what it did before, to the end, and only afterwards joins neighbours into new pieces. No old merge becomes
possible again, since it would need two old pieces side by side that it would have joined already.
"""

import heapq
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping
from itertools import groupby, pairwise

Merge = tuple[str, ...]
"""Two pieces to join, or one character that the vocabulary lacks."""


class BPEGrowth:
    """New pieces on top of a BPE model.

    Args:
        encode: a run of known characters to the model's old pieces.
        vocabulary: all strings that are taken: pieces, special and added tokens.
        byte_fallback: whether unknown characters become byte pieces.
    """

    def __init__(self, encode: Callable[[str], list[str]], vocabulary: Iterable[str], byte_fallback: bool) -> None:
        self.old_encoding = encode
        self.taken = set(vocabulary)
        self.known = {piece for piece in self.taken if len(piece) == 1}
        self.byte_fallback = byte_fallback
        self.pieces: list[str] = []
        self.ranks: dict[Merge, int] = {}

    def symbols(self, word: str) -> list[str]:
        """The old pieces of a word; a character that the old model lacks stays one symbol, whole.

        Cutting at such characters changes nothing: no merge reaches across them, and bytes do not merge.
        """
        symbols: list[str] = []
        for known, run in groupby(word, self.known.__contains__):
            characters = "".join(run)
            symbols += self.old_encoding(characters) if known else characters
        return symbols

    def encode(self, word: str) -> list[str]:
        """The pieces of a word under old and new merges; characters that are still unknown stay as they are."""
        symbols = self.symbols(word)
        while True:
            ranked = [(self.ranks[pair], pair) for pair in pairwise(symbols) if pair in self.ranks]
            if not ranked:
                return symbols
            symbols = join(symbols, min(ranked)[1])

    def allows(self, merge: Merge) -> bool:
        """Whether a merge makes a new piece out of pieces that exist."""
        return "".join(merge) not in self.taken and (len(merge) == 1 or all(piece in self.taken for piece in merge))

    def add(self, merge: Merge) -> None:
        piece = "".join(merge)
        if len(merge) == 2:
            self.ranks[merge] = len(self.ranks)
        self.pieces.append(piece)
        self.taken.add(piece)

    def saving(self, merge: Merge) -> int:
        """Tokens that one application of a merge saves."""
        if len(merge) == 2 or not self.byte_fallback:
            return 1
        return len(merge[0].encode()) - 1

    def reach(self, piece: str, room: int) -> bool:
        """Adds what it takes for `piece` to be encoded as one token; False, and nothing, if that is impossible.

        Args:
            piece: a string that is not in the vocabulary.
            room: most pieces to add, those on the way to `piece` included.
        """
        symbols = self.encode(piece)
        made = {symbol for symbol in symbols if symbol not in self.taken}
        plan: list[Merge] = [(character,) for character in sorted(made)]
        while len(symbols) > 1:
            # A piece that exists already must not get a second way: old texts would be encoded differently.
            pairs = [pair for pair in pairwise(symbols) if "".join(pair) not in self.taken | made]
            if not pairs:
                return False
            plan.append(pairs[0])
            made.add("".join(pairs[0]))
            symbols = join(symbols, pairs[0])
        if len(plan) > room:
            return False
        for merge in plan:
            self.add(merge)
        return True


def join(symbols: list[str], pair: Merge) -> list[str]:
    """Joins each occurrence of a pair, from left to right."""
    joined: list[str] = []
    position = 0
    while position < len(symbols):
        if tuple(symbols[position : position + 2]) == pair:
            joined.append("".join(pair))
            position += 2
        else:
            joined.append(symbols[position])
            position += 1
    return joined


class MergeLearner:
    """Sennrich et al. 2016, section 3.2, started from the pieces of an existing tokenizer instead of characters.

    A character that the vocabulary lacks competes with the pairs: it saves as many tokens as it has bytes, less one.
    """

    def __init__(self, growth: BPEGrowth, words: Mapping[str, int]) -> None:
        self.growth = growth
        self.words = [growth.symbols(word) for word in words]
        self.repeats = list(words.values())
        self.counts: Counter[Merge] = Counter()
        self.places: defaultdict[Merge, set[int]] = defaultdict(set)
        self.queue: list[tuple[int, Merge]] = []
        for index in range(len(self.words)):
            self.count(index, 1)

    def count(self, index: int, sign: int) -> None:
        """Adds a word's candidates to the counts, or takes them away."""
        symbols = self.words[index]
        unknown = [(symbol,) for symbol in symbols if symbol not in self.growth.taken]
        for merge in [*unknown, *pairwise(symbols)]:
            self.counts[merge] += sign * self.repeats[index]
            self.places[merge].add(index)

    def learn(self, number: int, min_frequency: int) -> None:
        """Adds up to `number` pieces, each time the one that saves most tokens; ties go by the pieces' strings."""
        changed = set(self.counts)
        while len(self.growth.pieces) < number:
            for merge in changed:
                if self.counts[merge] >= min_frequency and self.growth.allows(merge):
                    heapq.heappush(self.queue, (-self.weight(merge), merge))
            best = self.next_best(min_frequency)
            if best is None:
                return
            changed = self.apply(best)

    def weight(self, merge: Merge) -> int:
        return self.counts[merge] * self.growth.saving(merge)

    def next_best(self, min_frequency: int) -> Merge | None:
        while self.queue:
            weight, merge = heapq.heappop(self.queue)
            current = self.counts[merge] >= min_frequency and -weight == self.weight(merge) > 0
            if current and self.growth.allows(merge):
                return merge
        return None

    def apply(self, merge: Merge) -> set[Merge]:
        """Adds a piece and rewrites the words that hold it; returns the candidates whose counts or rights changed."""
        changed: set[Merge] = set()
        indices = self.places.pop(merge)
        for index in indices:
            self.count(index, -1)
            changed.update(pairwise(self.words[index]))
        self.growth.add(merge)
        for index in indices:
            if len(merge) == 2:
                self.words[index] = join(self.words[index], merge)
            self.count(index, 1)
            changed.update(pairwise(self.words[index]))
        return changed
