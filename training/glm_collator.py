"""The collator of GLM's objective: autoregressive blank infilling (arXiv 2103.10360), packed."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from minillm.data.sentence_ends import ListedEnds, SentenceEnds, id_table, special_ids
from minillm.training.document_collator import DocumentCollator
from minillm.training.objective import Objective
from minillm.training.objective_blanks import BLANKS, FilledBlanks
from minillm.training.random_draws import draws as draws

MIXTURE = {"token": 0.5, "sentence": 0.25, "document": 0.25}


@dataclass
class DataCollatorForGLM(DocumentCollator):
    """Cuts spans out of documents for a prefix language model to fill in, and packs several documents into a row (GLM,
    arXiv 2103.10360, sections 2.1 and 2.2).

    Samples are those of `DataCollatorForCausalLM`; where `labels` are -100 nothing is cut out, and neither are special
    tokens. Of each document one kind of spans is drawn by the weights of `mixture`:

    - "token": spans with lengths from Poisson(`mean_span_length`) without 0 until they cover `mask_fraction` of the
      document, each replaced by `mask_token_id`; two have a token between them at least.
    - "sentence": whole sentences (see `SentenceEnds`) until they cover as much, each replaced by `smask_token_id`;
      neighbouring ones keep blanks of their own. A document of one sentence is cut out whole.
    - "document": one span up to the last token, `document_fraction` of the document long, replaced by
      `gmask_token_id`.

    See `minillm.data.span_masking` for the details and `corrupt` there for a worked example of the arrays.

    Called with n samples it returns a dict of int64 tensors [rows, length]: `input_ids`, each document as its text
    with blanks (Part A) and then the spans in random order, each after `sop_token_id` (Part B); `labels`, the spans'
    tokens and, in the slot after each span's last token, `eop_token_id`, elsewhere -100 (position t-1 predicts
    labels[t], the model shifts); `attention_mask`; `position_ids`, the index in Part A, in a span that of its blank;
    `block_position_ids`, 0 in Part A and 1, 2, ... in a span; `prefix_mask`, 1 in Part A; `document_ids`, 1, 2, ...
    The last span of a document has its end token in the slot behind the document, be it another document's first slot,
    which nothing else scores, or padding: so a row holds at most `max_length` - 1 tokens.

    The draws follow from (seed, epoch, the document's ids) alone. Add `SetEpochCallback` for new ones in each epoch,
    and pack evaluation data with `pack_dataset(..., fixed_prefixes=True)`, whose rows keep the draws of epoch 0. Rows
    packed beforehand hold documents as they are. One of n tokens becomes n + 2 k with k spans; as k changes with the
    epoch, packing reserves room for the most spans that it may get (`most_spans`; more are not cut out).

    Args:
        mixture: weights of the kinds, of any sum; a kind that is left out does not occur.
        mask_fraction: part of a document's tokens that spans and sentences cover, above 0 and at most 0.5.
        mean_span_length: of the Poisson distribution, before zeros are left out.
        document_fraction: (shortest, longest) part of a document that the one span covers; uniform.
        gmask_counts: on the first axis a span of a document counts on from the end of Part A. For models with one axis
            (RoPE, ALiBi, ...), in which the tokens of a long span would all stand at one place; GLM-130B was trained
            so, and `generate()` and `fill()` do it for such models by themselves.
        mask_token_id, smask_token_id, gmask_token_id, sop_token_id, eop_token_id: None takes the tokenizer's. Ids may
            be equal.
        special_token_ids: ids that are never cut out, beside those above, padding and the tokenizer's special tokens.
        sentence_end_token_ids: ids that end a sentence; None asks the tokenizer.
        overlong: a document that may need more than a row is split into pieces that count as documents of their own
            before anything is cut out, or raises. Spans are never truncated.

    Raises:
        ValueError: arguments that do not go together, or an id that neither the tokenizer nor an argument gives; when
            called, as `DataCollatorForCausalLM`.
    """

    mixture: Mapping[str, float] = field(default_factory=MIXTURE.copy)
    mask_fraction: float = 0.15
    mean_span_length: float = 3.0
    document_fraction: tuple[float, float] = (0.5, 1.0)
    gmask_counts: bool = False
    mask_token_id: int | None = None
    smask_token_id: int | None = None
    gmask_token_id: int | None = None
    sop_token_id: int | None = None
    eop_token_id: int | None = None
    special_token_ids: Iterable[int] = ()
    sentence_end_token_ids: Iterable[int] | None = None

    def make_objective(self) -> Objective:
        kinds = [kind for kind in BLANKS if self.mixture.get(kind)]
        names = [*(BLANKS[kind] for kind in kinds), "sop_token_id", "eop_token_id"]
        token_ids = {name: self._find_id(name) for name in names}
        own = set() if self.tokenizer is None else special_ids(self.tokenizer)
        special: set[Any] = own.union(token_ids.values(), [self.pad_token_id], self.special_token_ids)
        return FilledBlanks(
            mixture=self.mixture,
            mask_fraction=self.mask_fraction,
            mean_span_length=self.mean_span_length,
            document_fraction=self.document_fraction,
            gmask_counts=self.gmask_counts,
            token_ids=token_ids,
            special=id_table(special),
            find_ends=self._sentence_ends() if "sentence" in kinds else None,
        )

    def _find_id(self, name: str) -> int:
        if getattr(self, name) is None:
            setattr(self, name, getattr(self.tokenizer, name, None))
        if getattr(self, name) is None:
            raise ValueError(f"no `{name}`: give it, or a `tokenizer` that has one")
        return getattr(self, name)

    def _sentence_ends(self) -> SentenceEnds | ListedEnds:
        if self.sentence_end_token_ids is not None:
            return ListedEnds(self.sentence_end_token_ids)
        if self.tokenizer is None:
            raise ValueError(
                "nothing tells where sentences end: give `sentence_end_token_ids` or a `tokenizer`, or a `mixture` "
                'without "sentence"'
            )
        return SentenceEnds(self.tokenizer)

    def most_slots(self, tokens: int) -> int:
        """The tokens that a document of `tokens` tokens may become, at most, in any epoch."""
        return self.objective.slots(tokens)
