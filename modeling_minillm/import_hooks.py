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
from typing import Any, NamedTuple

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
        with self.finder.importing(module):
            self.loader.exec_module(module)


class _Kept(importlib.abc.Loader):
    """Gives a complete module back that Python has dropped, since a function that was called at its end raised. Run
    anew, it would define its classes a second time."""

    def __init__(self, module: ModuleType, finder: "AfterImport") -> None:
        self.module = module
        self.spec = module.__spec__
        self.finder = finder

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return self.module

    def exec_module(self, module: ModuleType) -> None:
        module.__spec__ = self.spec
        with self.finder.importing(module):
            pass


class Waiting(NamedTuple):
    """A function that waits for the first import of any of these modules, and a lock that is held while it runs."""

    function: Callable[[], None]
    modules: tuple[str, ...]
    running: threading.Lock


class AfterImport(importlib.abc.MetaPathFinder):
    """Stands before all other finders as long as a function waits."""

    def __init__(self) -> None:
        self.waiting: list[Waiting] = []
        self.dropped: dict[str, ModuleType] = {}
        self.thread = threading.local()

    def call(self, function: Callable[[], None], *modules: str) -> None:
        """Calls `function` after the first import of any of these modules; now if one is there already. A function
        that raises is called again, at once and at each import that follows, until it has come to its end once."""
        entry = Waiting(function, modules, threading.Lock())
        self.waiting.append(entry)
        if self not in sys.meta_path:
            sys.meta_path.insert(0, self)
        self._call(entry)
        self._leave()

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname.partition(".")[0] not in PACKAGES:
            return None
        if (kept := self.dropped.pop(fullname, None)) is not None:
            return ModuleSpec(fullname, _Kept(kept, self), is_package=hasattr(kept, "__path__"))
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
    def importing(self, module: ModuleType) -> Iterator[None]:
        self.thread.depth = getattr(self.thread, "depth", 0) + 1
        try:
            yield
        finally:
            self.thread.depth -= 1
        if not self.thread.depth:
            try:
                self._call_what_can_be()
            except BaseException:
                self.dropped[module.__name__] = module
                raise

    def _call_what_can_be(self) -> None:
        for entry in list(self.waiting):
            self._call(entry)
        self._leave()

    def _leave(self) -> None:
        if not self.waiting and not self.dropped:
            # Another thread may have taken it away.
            with contextlib.suppress(ValueError):
                sys.meta_path.remove(self)

    def _call(self, entry: Waiting) -> None:
        if not any(name in sys.modules or name in self.dropped for name in entry.modules):
            return
        # What the function imports ends imports, too. Nor does another thread wait here: the function may need a
        # module that this thread is importing.
        if not entry.running.acquire(blocking=False):
            return
        try:
            if entry in self.waiting:
                self._try(entry)
        finally:
            entry.running.release()

    def _try(self, entry: Waiting) -> None:
        try:
            entry.function()
        except Exception:
            # Python hands out what another thread has half imported, if that thread fails, but once only.
            entry.function()
        except BaseException:
            # Interrupted. The next import may be too late, since the Auto classes are asked without one.
            with contextlib.suppress(Exception):
                entry.function()
                self.waiting.remove(entry)
            raise
        self.waiting.remove(entry)


after_import = AfterImport()
