"""Makes one Python file of a module and of everything that it imports from MiniLLM.

The Hub's custom models hold one file each for config, model and tokenizer, and `trust_remote_code` understands only
imports between files of one folder. Here the package's modules are written one after the other, each after those that
it imports; their imports are merged at the top, and those of one another are dropped.
"""

import ast
import functools
import importlib.util
import re
import symtable
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from minillm.version import __version__

PACKAGE = "minillm"
WIDTH = 119
NESTED = re.compile(r"\s+(from|import)\s")


class Name(NamedTuple):
    """A name that an import binds: `from module import name as bound`, or `import module as bound`."""

    module: str
    name: str | None
    bound: str


class Module(NamedTuple):
    """One module of the package: its full name, source lines and top-level statements."""

    name: str
    lines: list[str]
    body: list[ast.stmt]

    @property
    def docstring(self) -> ast.Expr | None:
        match self.body[:1]:
            case [ast.Expr(value=ast.Constant(value=str())) as first]:
                return first
        return None

    @property
    def docstring_text(self) -> str:
        """As it is written; empty if there is none."""
        node = self.docstring
        return "" if node is None else "\n".join(self.lines[node.lineno - 1 : node.end_lineno])

    def imports(self) -> Iterator[Name]:
        """What its top-level imports bind.

        Raises:
            ValueError: for an import that cannot be merged with those of other modules.
        """
        for node in self._nested_imports():
            if any(found.module.partition(".")[0] == PACKAGE for found in self._names(node)):
                raise self.error(node, "imports from the package below the top level; import it at the top")
        for node in self.body:
            if not isinstance(node, ast.Import | ast.ImportFrom):
                continue
            for found in self._names(node):
                ours = found.module.partition(".")[0] == PACKAGE
                if ours and (found.name is None or found.name != found.bound or _spec(found.module)[1]):
                    raise self.error(node, "needs the form `from minillm.module import name` to be bundled")
                yield found

    def _nested_imports(self) -> list[ast.Import | ast.ImportFrom]:
        # A look at the lines first: walking through all statements takes most of the time of a bundle.
        if not any(NESTED.match(line) for line in self.lines):
            return []
        nodes = [node for statement in self.body for node in ast.walk(statement)]
        return [node for node in nodes if isinstance(node, ast.Import | ast.ImportFrom) and node not in self.body]

    def _names(self, node: ast.Import | ast.ImportFrom) -> Iterator[Name]:
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Name(alias.name, None, alias.asname or alias.name)
            return
        if node.level or node.module in (None, "__future__") or any(alias.name == "*" for alias in node.names):
            raise self.error(node, "is relative, of all names, or from __future__; name the module and what it gives")
        for alias in node.names:
            yield Name(node.module or "", alias.name, alias.asname or alias.name)

    def definitions(self) -> Iterator[tuple[str, ast.stmt]]:
        """Top-level names with the statements that bind them."""
        for statement in self.body:
            if not isinstance(statement, ast.Import | ast.ImportFrom):
                for name in _bound_names(statement):
                    yield name, statement

    def error(self, node: ast.stmt, problem: str) -> ValueError:
        return ValueError(f"{self.name}, line {node.lineno}: `{ast.unparse(node)}` {problem}")


def _bound_names(statement: ast.stmt) -> list[str]:
    if isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        return [statement.name]
    table = symtable.symtable(ast.unparse(statement), PACKAGE, "exec")
    return [symbol.get_name() for symbol in table.get_symbols() if symbol.is_assigned()]


@functools.cache
def _spec(name: str) -> tuple[Path, bool]:
    """The file of a module, and whether it is a package."""
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:
        raise ValueError(f"{name} is no module with a file")
    return Path(spec.origin), spec.submodule_search_locations is not None


@functools.cache
def read_module(name: str) -> Module:
    text = _spec(name)[0].read_text("utf-8")
    return Module(name, text.splitlines(), ast.parse(text).body)


def modules_of(root: str, elsewhere: frozenset[str] = frozenset()) -> list[Module]:
    """The module and all that it imports from the package, each after those that it imports, but for `elsewhere`."""
    order: dict[str, Module] = {}
    waiting: set[str] = set()

    def add(name: str) -> None:
        if name in order or name in elsewhere:
            return
        if name in waiting:
            raise ValueError(f"{name} imports itself by way of {', '.join(sorted(waiting - {name}))}")
        waiting.add(name)
        module = read_module(name)
        for found in module.imports():
            if found.module.partition(".")[0] == PACKAGE:
                add(found.module)
        waiting.discard(name)
        order[name] = module

    add(root)
    return list(order.values())


def _are_equal(one: Name | ast.stmt, other: Name | ast.stmt) -> bool:
    if isinstance(one, ast.stmt) and isinstance(other, ast.stmt):
        return ast.dump(one) == ast.dump(other)
    return one == other


class _Bundle:
    """What stands in one file so far. A name may be bound twice only by the same import or the same statement."""

    def __init__(self, modules: list[Module], elsewhere: dict[str, str]) -> None:
        self.modules = modules
        self.elsewhere = elsewhere
        self.imports: set[Name] = set()
        self.meanings: dict[str, tuple[Name | ast.stmt, str]] = {}

    def bind(self, name: str, meaning: Name | ast.stmt, module: Module) -> bool:
        """Notes what a name means; whether another module has bound it to the same."""
        known, owner = self.meanings.setdefault(name, (meaning, module.name))
        if owner != module.name and not _are_equal(known, meaning):
            raise ValueError(
                f"{name} means one thing in {owner} and another in {module.name}; in one file it can mean only one: "
                "rename it"
            )
        return owner != module.name

    def take_imports(self, module: Module) -> None:
        inside = {other.name for other in self.modules}
        for found in module.imports():
            if found.module in inside:
                continue
            if found.module.partition(".")[0] == PACKAGE:
                found = Name(f".{self.elsewhere[found.module]}", found.name, found.bound)
            self.bind(found.bound, found, module)
            self.imports.add(found)

    def section(self, module: Module, is_root: bool) -> str:
        """The module without imports and statements that stand above already; the root's docstring is the file's."""
        dropped: set[ast.stmt] = {
            statement for statement in module.body if isinstance(statement, ast.Import | ast.ImportFrom)
        }
        if module.docstring is not None:
            dropped.add(module.docstring)
        for name, statement in module.definitions():
            if self.bind(name, statement, module):
                dropped.add(statement)
        gone = {number for node in dropped for number in range(node.lineno, (node.end_lineno or node.lineno) + 1)}
        kept = [line for number, line in enumerate(module.lines, 1) if number not in gone]
        text = re.sub(r"\n{4,}", "\n\n\n", "\n".join(kept)).strip("\n")
        title = f"# ---- {module.name} ----"
        if not is_root and module.docstring_text:
            title += f"\n{module.docstring_text}"
        return title + ("\n\n\n" if text.startswith(("def ", "class ", "@")) else "\n\n") + text


def _name_order(name: str) -> tuple[bool, bool, str]:
    return not (name.isupper() and len(name) > 1), not name[:1].isupper(), name


def _import_lines(names: set[Name]) -> list[str]:
    lines = [
        f"import {found.module}" + (f" as {found.bound}" if found.bound != found.module else "")
        for found in sorted((found for found in names if found.name is None), key=lambda found: found.module)
    ]
    for module in sorted({found.module for found in names if found.name is not None}):
        given = [found for found in names if found.module == module and found.name is not None]
        renamed = sorted((found.name, found.bound) for found in given if found.name != found.bound)
        items = sorted((found.bound for found in given if found.name == found.bound), key=_name_order)
        line = f"from {module} import {', '.join(items)}"
        if len(line) > WIDTH:
            line = f"from {module} import (\n" + "".join(f"    {item},\n" for item in items) + ")"
        lines += [line] if items else []
        lines += [f"from {module} import {name} as {bound}" for name, bound in renamed]
    return lines


def _merged_imports(names: set[Name]) -> str:
    """Standard library, other packages and files beside this one, a paragraph each."""

    def group(found: Name) -> int:
        top = found.module.partition(".")[0]
        return 2 if not top else int(top not in sys.stdlib_module_names)

    groups = [{found for found in names if group(found) == number} for number in range(3)]
    return "\n\n".join("\n".join(_import_lines(members)) for members in groups if members)


def bundle(root: str, elsewhere: dict[str, str]) -> str:
    """One file of `root` and of what it imports from the package.

    Args:
        root: full name of a module, e.g. `"minillm.modeling_minillm"`.
        elsewhere: modules that stand in a file beside this one: full name to that file's name without `.py`.

    Returns:
        Python source that depends on no other MiniLLM than the files of `elsewhere`. Equal input gives equal text.

    Raises:
        ValueError: if two modules mean different things by one name, or import the package in a way that cannot be
            bundled; the message names module and line.
    """
    modules = modules_of(root, frozenset(elsewhere))
    made = _Bundle(modules, elsewhere)
    for module in modules:
        made.take_imports(module)
    sections = [made.section(module, is_root=module.name == root) for module in modules]
    named = ", ".join(module.name.removeprefix(f"{PACKAGE}.") for module in modules)
    first = f"MiniLLM {__version__}, in one file made from: {named}."
    head = [
        textwrap.fill(first, WIDTH, initial_indent="# ", subsequent_indent="# "),
        modules[-1].docstring_text,
        _merged_imports(made.imports),
    ]
    return "\n\n".join(part for part in head if part) + "\n\n" + "\n\n\n".join(sections) + "\n"


ROOTS = {
    "configuration_minillm": "minillm.configuration.configuration_minillm",
    "modeling_minillm": "minillm.modeling_minillm",
    "tokenization_minillm": "minillm.tokenization.tokenization_minillm",
}
"""File name without `.py` to the module that it is made from."""

BESIDE = {"modeling_minillm": ("configuration_minillm",)}
"""Files that a file imports from; they always travel together."""


@functools.cache
def bundled_file(name: str) -> str:
    """The source of one of the files of `ROOTS`."""
    elsewhere = {module.name: file for file in BESIDE.get(name, ()) for module in modules_of(ROOTS[file])}
    return bundle(ROOTS[name], elsewhere)


def write_bundles(folder: str | Path, *names: str) -> None:
    """Writes files of `ROOTS`, and those that they import from, into a folder."""
    for name in dict.fromkeys(other for given in names for other in (*BESIDE.get(given, ()), given)):
        (Path(folder) / f"{name}.py").write_text(bundled_file(name), "utf-8")
