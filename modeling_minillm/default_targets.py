"""Adapters without `target_modules`, also where MiniLLM is not installed: the targets stand in PEFT's own tables."""

import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Callable
from types import ModuleType

from minillm.configuration.configuration_minillm import MiniLLMConfig

PEFT_TABLES = "peft.utils.constants"


class AfterImport(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Calls `act` with the module `name` when it has been imported."""

    def __init__(self, name: str, act: Callable[[ModuleType], None]) -> None:
        self.name = name
        self.act = act

    def find_spec(self, fullname, path, target=None):
        if fullname != self.name:
            return None
        sys.meta_path.remove(self)
        self.spec = importlib.util.find_spec(fullname)
        return importlib.machinery.ModuleSpec(fullname, self, origin=self.spec.origin)

    def create_module(self, spec):
        return importlib.util.module_from_spec(self.spec)

    def exec_module(self, module):
        self.spec.loader.exec_module(module)
        self.act(module)


def after_import(name: str, act: Callable[[ModuleType], None]) -> None:
    """Calls `act` with the module `name`, now or when it is first imported: importing PEFT for it here would double
    the time of `import minillm`."""
    # By name: a process holds this file several times, if it loads the code of several folders.
    finders = [finder for finder in sys.meta_path if type(finder).__name__ == AfterImport.__name__]
    if name in sys.modules:
        act(sys.modules[name])
    elif (name, act.__name__) not in [(finder.name, finder.act.__name__) for finder in finders]:
        sys.meta_path.insert(0, AfterImport(name, act))


def fill_peft_tables(constants: ModuleType) -> None:
    """Enters MiniLLM in every default-target table of PEFT that knows LLaMA: the modules have the same names (a
    feed-forward without a gate simply lacks that one, and PEFT matches what is there)."""
    for name, table in vars(constants).items():
        if name.startswith("TRANSFORMERS_MODELS_TO_") and isinstance(table, dict) and "llama" in table:
            table.setdefault(MiniLLMConfig.model_type, table["llama"])
