"""The Python files beside a saved model: three, each whole, and made alike every time."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest
from stranger_cases import tiny

import minillm
from minillm import MiniLLMConfig, MiniLLMTokenizer
from minillm.publishing import bundle
from minillm.publishing.bundle import ROOTS, bundled_file, modules_of


def imported_modules(text: str) -> set[str]:
    nodes = list(ast.walk(ast.parse(text)))
    named = {"." * node.level + (node.module or "") for node in nodes if isinstance(node, ast.ImportFrom)}
    return named | {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}


def test_a_model_a_config_and_a_tokenizer_leave_these_files(tmp_path):
    tiny().save_pretrained(tmp_path / "model")
    MiniLLMConfig(vocab_size=8).save_pretrained(tmp_path / "config")
    MiniLLMTokenizer.train_from_iterator(["one two"], vocab_size=300, show_progress=False).save_pretrained(
        tmp_path / "tokenizer"
    )
    files = {folder.name: {path.name for path in folder.glob("*.py")} for folder in tmp_path.iterdir()}
    model = {"configuration_minillm.py", "modeling_minillm.py"}
    assert files == {"model": model, "config": model, "tokenizer": {"tokenization_minillm.py"}}
    sizes = {name: len(bundled_file(name).encode()) for name in ROOTS}
    print(sizes, "together", sum(sizes.values()), "bytes")


@pytest.mark.parametrize("name", ROOTS)
def test_a_file_needs_no_minillm(name):
    text = bundled_file(name)
    found = imported_modules(text)
    assert not {module for module in found if module.partition(".")[0] == "minillm"}
    beside = {"modeling_minillm": {".configuration_minillm"}}
    assert {module for module in found if module.startswith(".")} == beside.get(name, set())
    assert text.splitlines()[0].startswith(f"# MiniLLM {minillm.__version__}, in one file made from: ")


@pytest.mark.parametrize("name", ROOTS)
def test_every_definition_comment_and_docstring_of_the_modules_stands_in_the_file(name):
    text = bundled_file(name)
    lines = set(text.splitlines())
    elsewhere = modules_of(ROOTS["configuration_minillm"]) if name == "modeling_minillm" else []
    modules = modules_of(ROOTS[name], frozenset(module.name for module in elsewhere))
    definitions = {node.name for node in ast.parse(text).body if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    for module in modules:
        imports = [node for node in module.body if isinstance(node, ast.Import | ast.ImportFrom)]
        gone = {number for node in imports for number in range(node.lineno, node.end_lineno + 1)}
        kept = [line for number, line in enumerate(module.lines, 1) if number not in gone]
        assert [line for line in kept if line not in lines] == [], module.name
        named = {node.name for node in module.body if isinstance(node, ast.FunctionDef | ast.ClassDef)}
        assert named <= definitions, module.name


def test_what_travels_is_the_modeling_folder_and_nothing_of_other_rooms():
    travelling = {module.name for root in ROOTS.values() for module in modules_of(root)}
    assert {name.rpartition(".")[0] for name in travelling} == {
        "minillm",
        "minillm.configuration",
        "minillm.tokenization",
    }
    here = {name.rpartition(".")[2] for name in travelling if name.count(".") == 1}
    folder = {path.stem for path in Path(minillm.__file__).parent.glob("*.py")}
    assert folder - here == {"__init__", "__main__"}
    assert not [name for name in travelling if name.startswith("minillm.configuration.presets")]


@pytest.mark.slow
def test_two_processes_make_equal_files():
    code = (
        "import hashlib; from minillm.publishing.bundle import ROOTS, bundled_file\n"
        "print([hashlib.sha256(bundled_file(name).encode()).hexdigest() for name in ROOTS])"
    )
    runs = [
        subprocess.run(
            [sys.executable, "-c", code], env={"PYTHONHASHSEED": seed}, capture_output=True, text=True, check=True
        )
        for seed in "12"
    ]
    assert runs[0].stdout == runs[1].stdout and "'" in runs[0].stdout


@pytest.fixture
def written(tmp_path, monkeypatch):
    """Bundles small modules of a made-up package."""

    def write(root: str, elsewhere: dict[str, str] | None = None, **sources: str) -> str:
        package = tmp_path / "madeup"
        package.mkdir(exist_ok=True)
        for name, text in {"__init__": "", **sources}.items():
            (package / f"{name}.py").write_text(text, "utf-8")
        monkeypatch.syspath_prepend(tmp_path)
        monkeypatch.setattr(bundle, "PACKAGE", "madeup")
        for cached in (bundle.read_module, bundle._spec):
            cached.cache_clear()
        return bundle.bundle(f"madeup.{root}", elsewhere or {})

    yield write
    for name in [name for name in sys.modules if name.partition(".")[0] == "madeup"]:
        del sys.modules[name]


def test_modules_come_after_what_they_import_and_imports_are_merged(written):
    text = written(
        "top",
        base='"""Base."""\n\nimport os\nfrom pathlib import Path\n\n# Why.\nONE = os.sep\nlogger = str(Path())\n',
        middle="from pathlib import Path, PurePath\n\nfrom madeup.base import ONE\n\nlogger = str(Path())\nTWO = 2\n",
        top='"""Top."""\n\nfrom madeup.middle import TWO\n\nTHREE = TWO\n',
    )
    assert text.partition("\n\n")[2] == (
        '"""Top."""\n\nimport os\nfrom pathlib import Path, PurePath\n\n'
        '# ---- madeup.base ----\n"""Base."""\n\n# Why.\nONE = os.sep\nlogger = str(Path())\n\n\n'
        "# ---- madeup.middle ----\n\nTWO = 2\n\n\n"
        "# ---- madeup.top ----\n\nTHREE = TWO\n"
    )


REFUSED = {
    "one name, two values": ({"low": "X = 1\n", "top": "from madeup.low import Y\n\nX = 2\n"}, "X means one thing in"),
    "one name, import and value": (
        {"low": "from math import pi\n", "top": "from madeup.low import Y\n\npi = 3\n"},
        "pi means one thing in",
    ),
    "one name, two imports": (
        {"low": "from os import path\n", "top": "from sys import path\n\nfrom madeup.low import Y\n"},
        "path means one thing in",
    ),
    "in a function": ({"low": "", "top": "def f():\n    from madeup.low import Y\n"}, "line 2.*below the top level"),
    "in a try": (
        {"low": "", "top": "try:\n    import madeup.low\nexcept ImportError:\n    pass\n"},
        "line 2.*below the top level",
    ),
    "a module as a name": (
        {"low": "", "top": "from madeup import low\n"},
        "line 1.*`from minillm.module import name`",
    ),
    "renamed": ({"low": "", "top": "from madeup.low import Y as Z\n"}, "line 1.*`from minillm.module import name`"),
    "a whole module": ({"low": "", "top": "import madeup.low\n"}, "line 1.*`from minillm.module import name`"),
    "relative": ({"low": "", "top": "from .low import Y\n"}, "line 1.*relative"),
    "a circle": ({"low": "from madeup.top import Y\n", "top": "from madeup.low import Y\n"}, "imports itself"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_stand_in_one_file_is_refused(written, case):
    sources, words = REFUSED[case]
    with pytest.raises(ValueError, match=words):
        written("top", **sources)


@pytest.mark.slow
def test_a_copy_has_no_presets_and_says_where_they_are(tmp_path):
    MiniLLMConfig(vocab_size=8).save_pretrained(tmp_path)
    code = (
        "import sys; sys.modules['minillm'] = None\n"
        "from transformers import AutoConfig\n"
        "config = AutoConfig.from_pretrained(sys.argv[1], trust_remote_code=True)\n"
        "try:\n    type(config).from_preset('gpt2')\nexcept ImportError as error:\n    print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True)
    assert "pip install minillm-hf" in done.stdout
