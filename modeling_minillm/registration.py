"""Makes transformers know MiniLLM: Auto classes and attention in blocks."""

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
)
from transformers.models.auto import modeling_auto

from minillm import blocks_for_any_model
from minillm.configuration.configuration_minillm import MiniLLMConfig
from minillm.modeling_minillm import (
    MiniLLMForCausalLM,
    MiniLLMForQuestionAnswering,
    MiniLLMForSequenceClassification,
    MiniLLMForTokenClassification,
    MiniLLMModel,
)
from minillm.tokenization.tokenization_minillm import MiniLLMTokenizer

AUTO_CLASSES = {
    AutoModel: MiniLLMModel,
    AutoModelForCausalLM: MiniLLMForCausalLM,
    AutoModelForSequenceClassification: MiniLLMForSequenceClassification,
    AutoModelForTokenClassification: MiniLLMForTokenClassification,
    AutoModelForQuestionAnswering: MiniLLMForQuestionAnswering,
}


def register() -> None:
    """Registers config, models and tokenizer with transformers' Auto classes, and attention in blocks for every
    model."""
    blocks_for_any_model.register()
    AutoConfig.register(MiniLLMConfig.model_type, MiniLLMConfig, exist_ok=True)
    for auto_class, model_class in AUTO_CLASSES.items():
        auto_class.register(MiniLLMConfig, model_class, exist_ok=True)
    # Trainer's label smoothing shifts labels, and pipelines know a model, by the names in this table.
    modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.setdefault(MiniLLMConfig.model_type, MiniLLMForCausalLM.__name__)
    AutoTokenizer.register(MiniLLMConfig, fast_tokenizer_class=MiniLLMTokenizer, exist_ok=True)
