"""Finds the private names of torch and transformers in what is shipped: what `docs/private-names.md` names."""

import ast
import importlib
import inspect
import re
from collections import defaultdict
from pathlib import Path

import torch
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

REPOSITORY = Path(__file__).parents[2]
ROOMS = sorted(path.parent.name for path in REPOSITORY.glob("*/__init__.py"))
PUBLIC = {"_replace", "_asdict", "_fields"}
"""Methods of named tuples."""

NOT_THEIRS = {"_getframe", "_loglikelihood_tokens"}
"""Of Python itself, and of lm-evaluation-harness, which need not be installed."""

AGREED = {"_apply_gate", "_validate_ntk_rope_parameters", "_model_name_or_path"}
"""Two methods of ours, which transformers calls by their names, and a key that it writes: no base class has them."""

OWNERS = (PreTrainedModel, PreTrainedTokenizerBase, PreTrainedConfig())


def is_private(name: str) -> bool:
    return re.fullmatch(r"_[A-Za-z]\w*", name) is not None


def sources() -> dict[str, ast.Module]:
    """The shipped files by path."""
    paths = [path for room in ROOMS for path in sorted((REPOSITORY / room).rglob("*.py"))]
    return {path.relative_to(REPOSITORY).as_posix(): ast.parse(path.read_text("utf-8")) for path in paths}


def module_of(path: str):
    parts = [part for part in path.removesuffix(".py").split("/") if part not in ("modeling_minillm", "__init__")]
    return importlib.import_module(".".join(["minillm", *parts]))


def mentioned(node: ast.AST) -> list[str]:
    """The names that one node of a syntax tree reads, calls, sets, imports or gives as a keyword."""
    if isinstance(node, ast.Attribute):
        return [node.attr]
    if isinstance(node, ast.ImportFrom):
        return [*(node.module or "").split("."), *(alias.name for alias in node.names)]
    if isinstance(node, ast.Import):
        return [part for alias in node.names for part in alias.name.split(".")]
    if isinstance(node, ast.keyword):
        return [node.arg or ""]
    if isinstance(node, ast.Constant) and isinstance(node.value, str) and is_private(node.value):
        theirs = hasattr(torch.ops.aten, node.value) or any(hasattr(owner, node.value) for owner in OWNERS)
        return [node.value] if theirs or node.value in AGREED else []
    return []


def defined(node: ast.AST) -> list[str]:
    """The names that one node defines, as a function, class, variable or argument."""
    if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
        return [node.name]
    if isinstance(node, ast.arg):
        return [node.arg]
    return [node.id] if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store) else []


def set_on_self(node: ast.AST) -> list[str]:
    """The attribute of `self` that one node sets, if it does."""
    of_self = isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "self"
    return [node.attr] if of_self and isinstance(node.ctx, ast.Store) else []


def classes_of(path: str, tree: ast.Module) -> dict[type, set[str]]:
    """The classes of a file with the private names that they define, those of their instances among them."""
    found = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef):
            parts = [name for part in ast.walk(node) for name in [*defined(part), *set_on_self(part)]]
            names = {name for name in parts if is_private(name) and name not in NOT_THEIRS}
            if names:
                found[getattr(module_of(path), node.name)] = names
    return found


def is_ours(kind: type) -> bool:
    return kind.__module__.startswith("minillm")


def bases_of_others(kind: type) -> list[type]:
    """The base classes of a class that are not ours; those of what inherits from it too, since a mixin overrides what
    stands after it. Subclasses of others, which a test may have left, say nothing of what we override."""
    kinds = [kind, *filter(is_ours, kind.__subclasses__())]
    return [base for each in kinds for base in inspect.getmro(each) if not is_ours(base)]


def private_names() -> dict[str, set[str]]:
    """The private names of others by name, with the files that they stand in."""
    trees, own, theirs = sources(), set(), set(AGREED)
    for path, tree in trees.items():
        own |= {name for node in ast.walk(tree) for name in defined(node)}
        for kind, names in classes_of(path, tree).items():
            own |= names
            theirs |= {name for name in names if any(hasattr(base, name) for base in bases_of_others(kind))}
    found = defaultdict(set)
    for path, tree in trees.items():
        for node in ast.walk(tree):
            for name in filter(is_private, [*mentioned(node), *defined(node)]):
                if name in theirs or name not in own | PUBLIC | NOT_THEIRS:
                    found[name].add(path)
    return dict(found)
