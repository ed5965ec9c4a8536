"""MiniLLM: one composable decoder for transformers, in which architectures are settings.

`import minillm` loads neither torch nor transformers. The models are entered in the Auto classes when these are first
imported, or at once if they are there.
"""

import importlib
import threading
from typing import TYPE_CHECKING, Any

from minillm.import_hooks import after_import
from minillm.version import __version__

if TYPE_CHECKING:
    from minillm import (
        cli,
        configuration,
        conversion,
        data,
        evaluation,
        experiments,
        plugin,
        publishing,
        tokenization,
        training,
    )
    from minillm.configuration.configuration_minillm import MiniLLMConfig
    from minillm.modeling_minillm import (
        MiniLLMForCausalLM,
        MiniLLMForQuestionAnswering,
        MiniLLMForSequenceClassification,
        MiniLLMForTokenClassification,
        MiniLLMModel,
        MiniLLMPreTrainedModel,
    )
    from minillm.prompts import find_prompts, number_prompts
    from minillm.tokenization.tokenization_minillm import MiniLLMTokenizer

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
    "cli",
    "configuration",
    "conversion",
    "data",
    "evaluation",
    "experiments",
    "find_prompts",
    "number_prompts",
    "plugin",
    "publishing",
    "tokenization",
    "training",
]

_LOCK = threading.RLock()
_ROOMS = (
    "cli",
    "configuration",
    "conversion",
    "data",
    "evaluation",
    "experiments",
    "plugin",
    "publishing",
    "tokenization",
    "training",
)
_MODULES = {
    "MiniLLMConfig": "configuration.configuration_minillm",
    "MiniLLMTokenizer": "tokenization.tokenization_minillm",
    "find_prompts": "prompts",
    "number_prompts": "prompts",
}
"""Where a public name comes from, if not from `modeling_minillm`."""


def _find(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    # One thread at a time: of two that import the same files in another order, one would meet them half imported.
    with _LOCK:
        if name in _ROOMS:
            return importlib.import_module(f"{__name__}.{name}")
        value = getattr(importlib.import_module(f"{__name__}.{_MODULES.get(name, 'modeling_minillm')}"), name)
        globals()[name] = value
        return value


# A type checker that saw this function would take any name for a public one.
if not TYPE_CHECKING:
    __getattr__ = _find


def __dir__() -> list[str]:
    return sorted(__all__)


def _register() -> None:
    importlib.import_module("minillm.plugin.registration").register()


after_import.call(
    _register,
    # The files and not their package: a second thread that imports one waits until the models are entered.
    "transformers.models.auto.configuration_auto",
    "transformers.models.auto.modeling_auto",
    "transformers.models.auto.tokenization_auto",
    "transformers.modeling_utils",
    "minillm.configuration.configuration_minillm",
    "minillm.tokenization.tokenization_minillm",
    "peft.utils.constants",
)
