"""Text and token ids to train on: corpora, documents, packing, spans to leave out, ends of sentences."""

from minillm.data.corpus import (
    CorpusError,
    TextDocument,
    cut_document,
    docstring_prose,
    load_corpus,
    split_corpus,
    standard_library,
    tokenize_documents,
)
from minillm.data.packed_rows import PackedRows
from minillm.data.span_masking import GLMSample, corrupt

__all__ = [
    "CorpusError",
    "GLMSample",
    "PackedRows",
    "TextDocument",
    "corrupt",
    "cut_document",
    "docstring_prose",
    "load_corpus",
    "split_corpus",
    "standard_library",
    "tokenize_documents",
]
