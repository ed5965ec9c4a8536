"""What a type checker sees of the package, in a user's script."""

import ast
import json
import os
import re
import subprocess
from pathlib import Path

import pytest
from typed_layout import CHECK, ROOT, lay_out

import minillm
from minillm import publishing

# Every line that is wrong says by which rule; the checker must find these and no other.
SCRIPT = """
import minillm
from minillm import MiniLLMConfig, MiniLLMForCausalLM, MiniLLMTokenizer
from minillm.conversion import convert
from minillm.evaluation import perplexity
from minillm.publishing import describe
from minillm.publishing import draw_masks  # wrong: reportAttributeAccessIssue
from minillm.training import DataCollatorForGLM, pack_dataset

minillm.nothing  # wrong: reportAttributeAccessIssue
minillm.training.nothing  # wrong: reportAttributeAccessIssue
config = MiniLLMConfig(vocab_size=100, hidden_size=8, num_attention_heads=2, head_dim=None)
config.head_dim * 2
config.head_dim = None
config.head_dim = "4"  # wrong: reportAttributeAccessIssue
describe(config)["size"].strip()
MiniLLMConfig(hidden_sizes=8)  # wrong: reportCallIssue
MiniLLMConfig(attention_type="left")  # wrong: reportArgumentType
MiniLLMConfig(head_dim="4")  # wrong: reportArgumentType
MiniLLMConfig.from_pretrained("folder").head_dim * 2
MiniLLMConfig.from_pretrained("folder") * 2  # wrong: reportOperatorIssue
MiniLLMConfig.from_preset(3)  # wrong: reportArgumentType

model = MiniLLMForCausalLM.from_pretrained("folder", revision="main")
MiniLLMForCausalLM.from_pretrained(3)  # wrong: reportArgumentType
MiniLLMForCausalLM.from_pretrained("folder", revision=3)  # wrong: reportArgumentType
model.config.head_dim * 2
model.forward(prefix_mask="left")  # wrong: reportArgumentType
model.fold_norm_head().fill("a [MASK]", None).texts
model.fill("a [MASK]", None).nothing  # wrong: reportAttributeAccessIssue
MiniLLMForCausalLM("folder")  # wrong: reportArgumentType

tokenizer = MiniLLMTokenizer.from_pretrained("folder")
tokenizer.answer_start_token_id
MiniLLMTokenizer.train_from_iterator(["a"], vocab_size="8")  # wrong: reportArgumentType
collator = DataCollatorForGLM(tokenizer, max_length=64, mixture={"token": 1.0})
DataCollatorForGLM(tokenizer, length=64)  # wrong: reportCallIssue
DataCollatorForGLM(tokenizer, max_length="64")  # wrong: reportArgumentType
rows = pack_dataset([], collator)
perplexity(model, rows, collator, batch_size=2).perplexity / 2
perplexity(model, rows, collator).nothing  # wrong: reportAttributeAccessIssue
perplexity(model, rows)  # wrong: reportCallIssue
perplexity(model, rows, collator, batch_size="2")  # wrong: reportArgumentType
convert("folder", "out", "llama", vocab_size=100).vocab_size
convert("folder")  # wrong: reportCallIssue
convert("folder", "out", max_shard_size=None)  # wrong: reportArgumentType
"""


def imported_for_checkers(module: object) -> list[str]:
    """What the module's block for type checkers imports."""
    names = []
    for node in ast.parse(Path(module.__file__).read_text("utf-8")).body:
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            names += [alias.asname or alias.name for statement in node.body for alias in statement.names]
    return sorted(names)


@pytest.mark.parametrize("module", [minillm, publishing], ids=lambda module: module.__name__)
def test_checkers_are_shown_what_is_there(module):
    assert imported_for_checkers(module) == sorted(set(module.__all__) - {"__version__"})


def errors_of(folder: Path, text: str) -> dict[int, list[str]]:
    """What the checker reports of a script whose interpreter finds the installed package: rules by line."""
    lay_out(folder / "site")
    (folder / "script.py").write_text(text, "utf-8")
    settings = {"include": ["script.py"], "typeCheckingMode": "standard", "reportUnusedExpression": False}
    (folder / "pyrightconfig.json").write_text(json.dumps(settings), "utf-8")
    paths = os.pathsep.join(filter(None, (str(folder / "site"), os.environ.get("PYTHONPATH"))))
    done = subprocess.run(
        [*CHECK, "--outputjson", "--project", str(folder)],
        env=os.environ | {"PYTHONPATH": paths},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout, done.stderr
    found: dict[int, list[str]] = {}
    for entry in json.loads(done.stdout)["generalDiagnostics"]:
        line = entry["range"]["start"]["line"] + 1
        found.setdefault(line, []).append(entry.get("rule", entry["message"]))
    return found


@pytest.mark.slow
def test_a_script_is_checked_against_the_real_signatures(tmp_path):
    lines = enumerate(SCRIPT.splitlines(), 1)
    expected = {number: [found[1]] for number, line in lines if (found := re.search(r"# wrong: (\w+)", line))}
    assert len(expected) > 20
    assert errors_of(tmp_path, SCRIPT) == expected


@pytest.mark.slow
def test_a_checker_sees_the_names_that_dir_shows(tmp_path):
    """Those, each of a known type, and no other name that the module binds."""
    shown = dir(minillm)
    bound = {
        name.id if isinstance(name, ast.Name) else (name.asname or name.name)
        for name in ast.walk(ast.parse((ROOT / "modeling_minillm" / "__init__.py").read_text("utf-8")))
        if isinstance(name, ast.alias) or (isinstance(name, ast.Name) and isinstance(name.ctx, ast.Store))
    }
    hidden = sorted(bound - set(shown) - {"__all__"})
    assert {"importlib", "after_import", "_LOCK"} <= set(hidden)
    text = "from minillm import *\n" + "".join(f"reveal_type({name})\n" for name in [*shown, *hidden])
    found = errors_of(tmp_path, text)
    first_hidden = 2 + len(shown)
    for number, name in enumerate(shown, 2):
        (message,) = found[number]
        assert re.search(rf'^Type of "{name}" is ', message) and not re.search(
            "Unknown|Any", message.split(" is ")[1]
        ), message
    for number, name in enumerate(hidden, first_hidden):
        assert "reportUndefinedVariable" in found[number], name
