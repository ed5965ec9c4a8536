"""Calls functions once a module of transformers, PEFT or MiniLLM has been imported, without importing it.

The functions need modules that may be half imported at that moment, as when `modeling_llama` imports the Auto classes.
So they wait until the outermost import of these packages has ended.
"""

import contextlib
import importlib.abc
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

PACKAGES = ("transformers", "peft", "minillm")


class _Loader(importlib.abc.Loader):
    """Runs a module by its own loader and tells the finder when that begins and ends."""

    def __init__(self, loader: importlib.abc.Loader, finder: "AfterImport") -> None:
        self.loader = loader
        self.finder = finder

    def __getattr__(self, name: str) -> Any:
        # `python -m` asks for code, and importlib.resources for files.
        return getattr(self.loader, name)

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        # Whoever asks a module for its loader, as `inspect` does for its source, gets the real one.
        module.__loader__ = self.loader
        if module.__spec__ is not None:
            module.__spec__.loader = self.loader
        with self.finder.importing():
            self.loader.exec_module(module)


class AfterImport(importlib.abc.MetaPathFinder):
    """Stands before all other finders as long as a function waits."""

    def __init__(self) -> None:
        self.waiting: list[tuple[tuple[str, ...], Callable[[], None]]] = []
        self.thread = threading.local()

    def call(self, function: Callable[[], None], *modules: str) -> None:
        """Calls `function` after the first import of any of these modules; now if one is there already."""
        if any(name in sys.modules for name in modules):
            function()
            return
        self.waiting.append((modules, function))
        if self not in sys.meta_path:
            sys.meta_path.insert(0, self)

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname.partition(".")[0] not in PACKAGES:
            return None
        finders = list(sys.meta_path)
        if self not in finders:
            # Another thread has called what waited.
            return None
        # Those behind this one: a process holds this file several times, if it loads the code of several folders.
        for finder in finders[finders.index(self) + 1 :]:
            find = getattr(finder, "find_spec", None)
            spec = None if find is None else find(fullname, path, target)
            if spec is not None:
                if hasattr(spec.loader, "exec_module"):
                    spec.loader = _Loader(spec.loader, self)
                return spec
        return None

    @contextlib.contextmanager
    def importing(self) -> Iterator[None]:
        self.thread.depth = getattr(self.thread, "depth", 0) + 1
        try:
            yield
        finally:
            self.thread.depth -= 1
        if not self.thread.depth:
            self._call_what_can_be()

    def _call_what_can_be(self) -> None:
        for entry in list(self.waiting):
            modules, function = entry
            if entry in self.waiting and any(name in sys.modules for name in modules):
                # First: what the function imports ends imports, too.
                self.waiting.remove(entry)
                function()
        if not self.waiting and self in sys.meta_path:
            sys.meta_path.remove(self)


after_import = AfterImport()
