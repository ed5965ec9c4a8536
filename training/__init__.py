"""Training with the stock `Trainer`: collators and their objectives, callbacks, checkpointing, rows for new tokens."""

from minillm.training.callbacks import SetEpochCallback
from minillm.training.checkpointing import selective_checkpointing
from minillm.training.collators import (
    DataCollatorForCausalLM,
    DataCollatorForPrefixLM,
    DataCollatorForSFT,
    pack_dataset,
)
from minillm.training.document_collator import DocumentCollator
from minillm.training.glm_collator import DataCollatorForGLM
from minillm.training.objective import Objective
from minillm.training.random_draws import draws
from minillm.training.vocabulary import resize_for_vocabulary

__all__ = [
    "DataCollatorForCausalLM",
    "DataCollatorForGLM",
    "DataCollatorForPrefixLM",
    "DataCollatorForSFT",
    "DocumentCollator",
    "Objective",
    "SetEpochCallback",
    "draws",
    "pack_dataset",
    "resize_for_vocabulary",
    "selective_checkpointing",
]
