"""Makes transformers and PEFT know MiniLLM: Auto classes, attention in blocks and default adapter targets."""

import importlib.abc
import importlib.machinery
import importlib.util
import sys
from types import ModuleType

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

PEFT_TABLES = "peft.utils.constants"
AUTO_CLASSES = {
    AutoModel: MiniLLMModel,
    AutoModelForCausalLM: MiniLLMForCausalLM,
    AutoModelForSequenceClassification: MiniLLMForSequenceClassification,
    AutoModelForTokenClassification: MiniLLMForTokenClassification,
    AutoModelForQuestionAnswering: MiniLLMForQuestionAnswering,
}


def fill_peft_tables(constants: ModuleType) -> None:
    """Enters MiniLLM in every default-target table of PEFT that knows LLaMA: the modules have the same names (a
    feed-forward without a gate simply lacks that one, and PEFT matches what is there)."""
    for name, table in vars(constants).items():
        if name.startswith("TRANSFORMERS_MODELS_TO_") and isinstance(table, dict) and "llama" in table:
            table.setdefault(MiniLLMConfig.model_type, table["llama"])


class _PeftTables(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Fills the tables when PEFT is first imported: importing it here would double the time of `import minillm`."""

    def find_spec(self, fullname, path, target=None):
        if fullname != PEFT_TABLES:
            return None
        sys.meta_path.remove(self)
        self.spec = importlib.util.find_spec(fullname)
        return importlib.machinery.ModuleSpec(fullname, self, origin=self.spec.origin)

    def create_module(self, spec):
        return importlib.util.module_from_spec(self.spec)

    def exec_module(self, module):
        self.spec.loader.exec_module(module)
        fill_peft_tables(module)


def register() -> None:
    """Registers config, models and tokenizer with transformers' Auto classes, attention in blocks for every model, and
    the adapter targets with PEFT."""
    blocks_for_any_model.register()
    AutoConfig.register(MiniLLMConfig.model_type, MiniLLMConfig, exist_ok=True)
    for auto_class, model_class in AUTO_CLASSES.items():
        auto_class.register(MiniLLMConfig, model_class, exist_ok=True)
    # Trainer's label smoothing shifts labels, and pipelines know a model, by the names in this table.
    modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.setdefault(MiniLLMConfig.model_type, MiniLLMForCausalLM.__name__)
    AutoTokenizer.register(MiniLLMConfig, fast_tokenizer_class=MiniLLMTokenizer, exist_ok=True)
    if PEFT_TABLES in sys.modules:
        fill_peft_tables(sys.modules[PEFT_TABLES])
    elif not any(type(finder).__name__ == _PeftTables.__name__ for finder in sys.meta_path):
        sys.meta_path.insert(0, _PeftTables())
