"""Training with the stock `Trainer`: collators, callbacks and text to train on."""

from minillm.training.callbacks import SetEpochCallback
from minillm.training.checkpointing import selective_checkpointing
from minillm.training.collators import (
    DataCollatorForCausalLM,
    DataCollatorForPrefixLM,
    DataCollatorForSFT,
    pack_dataset,
)
from minillm.training.corpus import (
    CorpusError,
    TextDocument,
    cut_document,
    docstring_prose,
    load_corpus,
    split_corpus,
    standard_library,
    tokenize_documents,
)
from minillm.training.glm_collator import DataCollatorForGLM
from minillm.training.span_masking import GLMSample, corrupt
from minillm.training.vocabulary import resize_for_vocabulary

__all__ = [
    "CorpusError",
    "DataCollatorForCausalLM",
    "DataCollatorForGLM",
    "DataCollatorForPrefixLM",
    "DataCollatorForSFT",
    "GLMSample",
    "SetEpochCallback",
    "TextDocument",
    "corrupt",
    "cut_document",
    "docstring_prose",
    "load_corpus",
    "pack_dataset",
    "resize_for_vocabulary",
    "selective_checkpointing",
    "split_corpus",
    "standard_library",
    "tokenize_documents",
]
