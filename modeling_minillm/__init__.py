"""MiniLLM: one composable decoder for transformers. Importing it registers everything with transformers and PEFT."""

from minillm.configuration.configuration_minillm import MiniLLMConfig
from minillm.hub import install
from minillm.modeling_minillm import (
    MiniLLMForCausalLM,
    MiniLLMForQuestionAnswering,
    MiniLLMForSequenceClassification,
    MiniLLMForTokenClassification,
    MiniLLMModel,
    MiniLLMPreTrainedModel,
)
from minillm.prompts import find_prompts, number_prompts
from minillm.registration import register
from minillm.tokenization.tokenization_minillm import MiniLLMTokenizer
from minillm.version import __version__

register()
install()

__all__ = [
    "MiniLLMConfig",
    "MiniLLMForCausalLM",
    "MiniLLMForQuestionAnswering",
    "MiniLLMForSequenceClassification",
    "MiniLLMForTokenClassification",
    "MiniLLMModel",
    "MiniLLMPreTrainedModel",
    "MiniLLMTokenizer",
    "__version__",
    "find_prompts",
    "number_prompts",
]
