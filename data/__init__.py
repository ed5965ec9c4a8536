"""Text and token ids to train on: files of records, corpora, conversations, packing, spans to leave out."""

from minillm.data.chat_templates import CHAT_TEMPLATES, chat_template
from minillm.data.containers import CorpusError, Record, read_records
from minillm.data.conversations import ChatEncoder, ConversationError
from minillm.data.corpus import (
    TextDocument,
    cut_document,
    docstring_prose,
    load_corpus,
    split_corpus,
    standard_library,
    tokenize_documents,
)
from minillm.data.packed_rows import PackedRows
from minillm.data.records import (
    FORMATS,
    Conversation,
    Example,
    PromptWithCompletion,
    Text,
    TokenIds,
    parse_columns,
    read_examples,
)
from minillm.data.samples import ExampleEncoder, Samples
from minillm.data.span_masking import GLMSample, corrupt

__all__ = [
    "CHAT_TEMPLATES",
    "FORMATS",
    "ChatEncoder",
    "Conversation",
    "ConversationError",
    "CorpusError",
    "Example",
    "ExampleEncoder",
    "GLMSample",
    "PackedRows",
    "PromptWithCompletion",
    "Record",
    "Samples",
    "Text",
    "TextDocument",
    "TokenIds",
    "chat_template",
    "corrupt",
    "cut_document",
    "docstring_prose",
    "load_corpus",
    "parse_columns",
    "read_examples",
    "read_records",
    "split_corpus",
    "standard_library",
    "tokenize_documents",
]
