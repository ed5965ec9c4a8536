"""The shape of the repository: packages, public names, light import, registration."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

import minillm
from benchmarks.code import MOST_LINES, MOST_PARAMETERS, functions_of

ROOT = Path(__file__).parent.parent


def setup_dict() -> dict[str, str]:
    for node in ast.parse((ROOT / "setup.py").read_text("utf-8")).body:
        if isinstance(node, ast.Assign) and node.targets[0].id == "PACKAGES":
            return ast.literal_eval(node.value)
    raise AssertionError("setup.py has no PACKAGES")


def test_packages_are_the_folders():
    rooms = {path.parent.name for path in ROOT.glob("*/__init__.py")}
    assert set(setup_dict().values()) == rooms
    nested = [path for room in rooms for path in (ROOT / room).glob("*/__init__.py")]
    assert not nested, f"sub-packages are missing from setup.py: {nested}"


def test_no_top_level_folder_shadows_the_package():
    assert not (ROOT / "minillm").exists()


def test_file_names_are_unique_across_rooms():
    names = [path.name for room in setup_dict().values() for path in (ROOT / room).glob("*.py")]
    names = [name for name in names if name != "__init__.py"]
    assert len(names) == len(set(names)), sorted(names)


# What stands in one line knows nothing of another in it, nor of those above.
FLOORS = (
    ("cli",),
    ("evaluation", "conversion"),
    ("training",),
    ("modeling_minillm",),
    ("configuration", "tokenization"),
)
# The version is everybody's; `python -m minillm` is a door to the command.
NOT_COUNTED = {"minillm.version", "minillm.cli.main"}


def test_arrows_between_rooms_run_one_way():
    folder_of = setup_dict()
    floor_of = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}
    assert set(floor_of) == set(folder_of.values())
    wrong = []
    for room in floor_of:
        for path in sorted((ROOT / room).glob("*.py")):
            for node in ast.walk(ast.parse(path.read_text("utf-8"))):
                if not isinstance(node, ast.ImportFrom) or not (node.module or "").startswith("minillm"):
                    continue
                package = ".".join(node.module.split(".")[:2])
                imported = folder_of.get(package, "modeling_minillm")
                if imported != room and floor_of[imported] <= floor_of[room] and node.module not in NOT_COUNTED:
                    wrong.append(f"{path.name}: {node.module}")
    assert wrong == []


def test_public_names():
    assert sorted(minillm.__all__) == [
        "MiniLLMConfig",
        "MiniLLMForCausalLM",
        "MiniLLMForQuestionAnswering",
        "MiniLLMForSequenceClassification",
        "MiniLLMForTokenClassification",
        "MiniLLMModel",
        "MiniLLMPreTrainedModel",
        "MiniLLMTokenizer",
        "__version__",
        "find_prompts",
        "number_prompts",
    ]


@pytest.mark.parametrize("auto_class", [AutoModel, AutoModelForCausalLM], ids=lambda cls: cls.__name__)
def test_auto_classes_know_the_models(auto_class):
    config = AutoConfig.for_model("minillm", vocab_size=8, hidden_size=8, num_hidden_layers=1, num_attention_heads=2)
    assert type(auto_class.from_config(config)).__name__.startswith("MiniLLM")


def in_fresh_process(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_import_is_light():
    code = (
        "import sys; from transformers import LlamaForCausalLM, PreTrainedTokenizerFast; before = set(sys.modules)\n"
        "import minillm; print(sorted({'peft', 'datasets', 'matplotlib', 'trl', 'lm_eval', 'rich', 'typer'} & "
        "(set(sys.modules) - before)))"
    )
    assert in_fresh_process(code) == "[]"


@pytest.mark.parametrize("order", ["import minillm, peft", "import peft, minillm"])
def test_peft_tables_are_filled_in_either_order(order):
    code = (
        f"{order}\nimport peft.utils.constants as tables\n"
        "found = [(name, table) for name, table in vars(tables).items() if name.startswith('TRANSFORMERS_MODELS_TO')"
        " and isinstance(table, dict) and 'llama' in table]\n"
        "print(len(found) > 20, all(table['minillm'] == table['llama'] for _, table in found))"
    )
    assert in_fresh_process(code) == "True True"


def test_too_old_transformers_is_refused_by_name():
    code = (
        "import transformers\ntransformers.__version__ = '5.0.0'\n"
        "try:\n    import minillm\nexcept ImportError as error:\n    print(error)"
    )
    message = in_fresh_process(code)
    assert "5.17" in message and "5.0.0" in message and "pip install" in message


def test_version_is_one():
    from importlib.metadata import version

    assert version("minillm-hf") == minillm.__version__


def test_py_typed_ships():
    assert (Path(minillm.__file__).parent / "py.typed").exists()


MANY_PARAMETERS = {
    "FlashInPartsBackward.forward": "an autograd.Function",
    "push_to_hub": "transformers' signature",
    "blocked_attention_mask": "the signature of transformers' `sdpa_mask`",
    "MiniLLMModel.forward": "public",
    "MiniLLMForCausalLM.forward": "public",
    "MiniLLMForSequenceClassification.forward": "public",
    "MiniLLMForTokenClassification.forward": "public",
    "MiniLLMForQuestionAnswering.forward": "public",
    "apply_template_literally": "the signature of transformers' `apply_chat_template`",
    "MiniLLMTokenizer.train_from_iterator": "transformers' `train_new_from_iterator`, and options of the trainers",
    "train": "a command",
    "generate": "a command",
    "convert": "public: what `load` takes, and where to write",
}
"""Functions of more than 8 parameters, and why."""


def test_functions_are_short():
    rooms = [path for folder in setup_dict().values() for path in sorted((ROOT / folder).glob("*.py"))]
    functions = [function for path in rooms for function in functions_of(path, ROOT)]
    assert len(functions) > 500
    assert [function for function in functions if function.lines > MOST_LINES] == []
    many = {function.place.split(":")[1] for function in functions if function.parameters > MOST_PARAMETERS}
    assert many == set(MANY_PARAMETERS)
