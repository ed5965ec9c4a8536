"""Counts of the code, from its syntax trees: a report to read beside another version's, not a target.

    python benchmarks/code.py [folder of the repository]

The forward path is `modeling_minillm.py` and what it imports from its own room, but for what `generate()`, filling and
saving add. Functions count without their docstring.
"""

import argparse
import ast
from pathlib import Path
from typing import NamedTuple

ROOMS = "modeling_minillm configuration tokenization conversion training evaluation cli".split()
BRANCHES = (ast.If, ast.IfExp)
BESIDE = {"decoding", "generation", "hub", "infilling", "version"}
MOST_LINES, MOST_PARAMETERS = 60, 8


class Function(NamedTuple):
    place: str
    lines: int
    parameters: int


def functions_of(path: Path, root: Path) -> list[Function]:
    """Every function of a file, by file and qualified name."""
    found = []

    def visit(node: ast.AST, within: str) -> None:
        for child in ast.iter_child_nodes(node):
            name = within
            if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                name = f"{within}.{child.name}" if within else child.name
            if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
                documented = ast.get_docstring(child) is not None
                lines = child.end_lineno - child.lineno + 1
                if documented:
                    lines -= child.body[0].end_lineno - child.body[0].lineno + 1
                arguments = child.args
                parameters = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
                parameters = [each for each in parameters if each.arg not in ("self", "cls", "ctx")]
                found.append(Function(f"{path.relative_to(root)}:{name}", lines, len(parameters)))
            visit(child, name)

    visit(ast.parse(path.read_text("utf-8")), "")
    return found


def forward_path(root: Path) -> list[Path]:
    """The files of the forward path."""
    room, found, waiting = root / "modeling_minillm", {}, ["modeling_minillm"]
    while waiting:
        name = waiting.pop()
        path = room / f"{name}.py"
        if name in found or name in BESIDE or not path.exists():
            continue
        found[name] = path
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("minillm."):
                waiting.append(node.module.removeprefix("minillm."))
    return [found[name] for name in sorted(found)]


def count_branches(path: Path) -> int:
    return sum(isinstance(node, BRANCHES) for node in ast.walk(ast.parse(path.read_text("utf-8"))))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("root", nargs="?", type=Path, default=Path(__file__).parent.parent)
    root = parser.parse_args().root.resolve()
    total_lines = total_branches = 0
    print(f"{'forward path':<28}{'lines':>7}{'ifs':>6}  longest function")
    for path in forward_path(root):
        lines, branches = len(path.read_text("utf-8").splitlines()), count_branches(path)
        total_lines, total_branches = total_lines + lines, total_branches + branches
        longest = max(functions_of(path, root), key=lambda each: each.lines, default=None)
        name = "" if longest is None else f"{longest.place.split(':')[1]} ({longest.lines})"
        print(f"{path.name:<28}{lines:>7}{branches:>6}  {name}")
    print(f"{len(forward_path(root)):>3} files{'':<19}{total_lines:>7}{total_branches:>6}\n")
    everything = [
        each for room in ROOMS for path in sorted((root / room).glob("*.py")) for each in functions_of(path, root)
    ]
    for title, places in (
        (
            f"functions above {MOST_LINES} lines",
            [f"{each.lines} {each.place}" for each in everything if each.lines > MOST_LINES],
        ),
        (
            f"above {MOST_PARAMETERS} parameters",
            [f"{each.parameters} {each.place}" for each in everything if each.parameters > MOST_PARAMETERS],
        ),
    ):
        print(f"{title}: {len(places)}")
        for place in places:
            print(f"  {place}")


if __name__ == "__main__":
    main()
