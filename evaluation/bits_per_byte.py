"""Perplexity and bits per byte of texts, as lm-evaluation-harness reads them (`loglikelihood_rolling`)."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from minillm.data.corpus import TextDocument
from minillm.evaluation.bootstrap import Interval, bootstrap_interval
from minillm.evaluation.encoding import encode, prefix_token_id
from minillm.evaluation.likelihood import (
    Progress,
    Row,
    fills_blanks,
    find_blanks,
    model_length,
    pair_row,
    reads_prefixes,
    require_language_model,
    require_vocabulary,
    score_rows,
)
from minillm.tokenization.glm_layout import GLMTokens, lay_out_row


class DocumentLoss(NamedTuple):
    """What a model says of a document.

    Attributes:
        name: the document's.
        num_bytes: its length in UTF-8.
        num_tokens: tokens scored, which is all of them.
        loss: their negative log likelihood, in nats.
    """

    name: str
    num_bytes: int
    num_tokens: int
    loss: float


class TextResult(NamedTuple):
    """What a model says of a corpus; intervals are those of the bootstrap over documents.

    Attributes:
        bits_per_byte: loss in bits over bytes of text: comparable between models with other tokenizers.
        byte_perplexity: 2 to the power of that, the harness's name for it.
        perplexity: the exponential of the mean loss of a token: comparable only with the same tokenizer.
        num_documents, num_bytes, num_tokens: what was scored.
    """

    bits_per_byte: Interval
    byte_perplexity: Interval
    perplexity: Interval
    num_documents: int
    num_bytes: int
    num_tokens: int


def rolling_windows(
    ids: Sequence[int], prefix_token: int, max_length: int
) -> Iterator[tuple[Sequence[int], Sequence[int]]]:
    """(context, tokens to predict) of each window of a text: every token is predicted once.

    The first window stands behind the prefix token; each further one predicts as many tokens as fit behind the one
    before it. The last one, which is shorter, begins as much earlier: what comes before it fills it up.

    Args:
        ids: token ids of the text.
        prefix_token: stands before the text.
        max_length: tokens that the model takes, at least 1.
    """
    known = [prefix_token, *ids]
    for start in range(0, len(ids), max_length):
        stop = min(start + max_length, len(ids))
        # A window of the full length holds max_length inputs, the last token being predicted only.
        first = start if start == 0 else stop - max_length
        yield known[first : start + 1], ids[start:stop]


def glm_row(context: Sequence[int], targets: Sequence[int], tokens: GLMTokens, two_axes: bool) -> Row:
    """A window as what fills the blank behind its context, in GLM's layout."""
    blank = tokens.blanks[0] if tokens.gmask is None else tokens.gmask
    # With one axis only, what follows [gMASK] counts on, as in `fill`.
    counting = () if two_axes else (tokens.gmask,)
    row = lay_out_row([*context, blank], [(len(context), targets)], tokens.sop, None, counting)
    inputs = {
        name: getattr(row, name)[:-1] for name in ("input_ids", "position_ids", "block_position_ids", "prefix_mask")
    }
    return Row(inputs, list(targets))


@dataclass(frozen=True)
class PreparedTexts:
    """Documents as rows for one model, all of them checked; `run` scores them.

    Attributes:
        documents: the texts.
        num_tokens: of each document.
        rows, owners: windows, and the number of the document that each belongs to.
    """

    model: PreTrainedModel
    documents: Sequence[TextDocument]
    num_tokens: list[int]
    rows: list[Row]
    owners: list[int]

    def run(self, batch_size: int = 8, progress: Progress | None = None) -> list[DocumentLoss]:
        """The loss of each document; arguments and errors as those of `document_losses`."""

        def name_of(row: int) -> str:
            return f"the document {self.documents[self.owners[row]].name}"

        losses = [0.0] * len(self.documents)
        scores = score_rows(self.model, self.rows, batch_size, progress, "windows", name_of)
        for owner, score in zip(self.owners, scores, strict=True):
            losses[owner] -= score.log_likelihood
        return [
            DocumentLoss(document.name, len(document.text.encode("utf-8", "surrogatepass")), count, loss)
            for document, count, loss in zip(self.documents, self.num_tokens, losses, strict=True)
        ]


def prepare_documents(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    documents: Sequence[TextDocument],
    max_length: int | None = None,
    special_tokens_in_text: bool = False,
    glm: bool = False,
) -> PreparedTexts:
    """All of `document_losses` but the forwards: what cannot be scored is refused here."""
    require_language_model(model)
    length = model_length(model, tokenizer) if max_length is None else max_length
    # A blank and a start token stand between the context of a window and what it predicts.
    most = length - 2 if glm else length
    if most < 1:
        raise ValueError(f"`max_length` is {length}; a window needs at least {1 + length - most} tokens")
    if not documents:
        raise ValueError("there are no documents to evaluate")
    first = prefix_token_id(tokenizer)
    tokens = find_blanks(model, tokenizer) if glm else None
    prefix = int(reads_prefixes(model))
    rows: list[Row] = []
    owners: list[int] = []
    encoded = encode(tokenizer, [document.text for document in documents], special_tokens_in_text)
    for number, ids in enumerate(encoded):
        if not ids:
            raise ValueError(f"the document {documents[number].name} is empty")
        for context, targets in rolling_windows(ids, first, most):
            if tokens is None:
                rows.append(pair_row(context, targets, prefix))
            else:
                rows.append(glm_row(context, targets, tokens, fills_blanks(model)))
            owners.append(number)
    require_vocabulary(model, rows, lambda row: f"the document {documents[owners[row]].name}")
    return PreparedTexts(model, documents, [len(ids) for ids in encoded], rows, owners)


def document_losses(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    documents: Sequence[TextDocument],
    max_length: int | None = None,
    batch_size: int = 8,
    special_tokens_in_text: bool = False,
    glm: bool = False,
    progress: Progress | None = None,
) -> list[DocumentLoss]:
    """The loss of each document, in lm-evaluation-harness' reading of a rolling log likelihood.

    Each token is scored once, in windows that predict no token twice, behind bos, else eos. To a model with
    `attention_type="prefix"` the first token of each window is the prefix, so all tokens scored come after it. With
    `glm` a window is what fills `[gMASK]` behind its context.

    Args:
        model: a causal or prefix language model.
        tokenizer: the model's.
        documents: texts with names.
        max_length: tokens in a window; None: those that the model takes.
        batch_size: windows in one forward.
        special_tokens_in_text: read the strings of special tokens in a text as these tokens, as the harness does;
            otherwise they are text.
        glm: read text as what fills a blank.
        progress: called after each batch with windows done and windows in all.

    Raises:
        ValueError: no documents, an empty one, a tokenizer without bos and eos or with tokens that the model lacks, a
            bidirectional model, `glm` with a model or tokenizer without blanks, `max_length` or `batch_size` below 1,
            or a loss that is no number.
    """
    prepared = prepare_documents(model, tokenizer, documents, max_length, special_tokens_in_text, glm)
    return prepared.run(batch_size, progress)


def summarize_losses(losses: Sequence[DocumentLoss], seed: int = 0) -> TextResult:
    """Perplexity and bits per byte of documents, with 95 % intervals (`bootstrap_interval` with this seed)."""
    nats = [each.loss for each in losses]
    per_byte = bootstrap_interval(nats, [each.num_bytes for each in losses], seed=seed)
    per_token = bootstrap_interval(nats, [each.num_tokens for each in losses], seed=seed)
    bits = Interval(*(each / math.log(2) for each in per_byte))
    return TextResult(
        bits_per_byte=bits,
        byte_perplexity=exponentials(per_byte),
        perplexity=exponentials(per_token),
        num_documents=len(losses),
        num_bytes=sum(each.num_bytes for each in losses),
        num_tokens=sum(each.num_tokens for each in losses),
    )


def exponentials(interval: Interval) -> Interval:
    """exp of a figure and of its ends, which keep their order; inf beyond the range of a float."""
    return Interval(*(math.exp(each) if each < 709.0 else math.inf for each in interval))


def loss_difference(losses: Sequence[DocumentLoss], base: Sequence[DocumentLoss], seed: int = 0) -> Interval:
    """How many bits per byte the losses are above those of a base model on the same documents, each document with
    itself. ValueError if the documents are others."""
    if [each[:2] for each in losses] != [each[:2] for each in base]:
        raise ValueError("the losses are not those of the same documents")
    bits = [(one.loss - other.loss) / math.log(2) for one, other in zip(losses, base, strict=True)]
    return bootstrap_interval(bits, [each.num_bytes for each in losses], seed=seed)
