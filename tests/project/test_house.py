"""The shape of the repository: packages, public names, light import, registration."""

import ast
import re
import subprocess
import sys
from importlib.metadata import requires, version
from pathlib import Path

import pytest
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

import minillm
from benchmarks.code import MOST_LINES, MOST_PARAMETERS, functions_of
from minillm.import_hooks import AfterImport
from minillm.publishing import hub

ROOT = Path(__file__).parents[2]


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


NAMES = [
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
ROOMS = sorted(name.removeprefix("minillm.") for name in setup_dict() if name != "minillm")

PARTS_OF_THE_MODEL = ("attention", "generation", "modeling")

# What stands in one line knows nothing of another in it, nor of those above.
FLOORS = (
    ("cli",),
    ("experiments",),
    ("evaluation", "conversion"),
    ("training",),
    ("data",),
    ("plugin",),
    ("publishing",),
    ("modeling_minillm",),
    ("configuration", "tokenization"),
)


def test_arrows_between_rooms_run_one_way():
    folder_of = setup_dict()
    floor_of = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}
    assert set(floor_of) == set(folder_of.values())
    wrong = []
    for room in floor_of:
        for path in sorted((ROOT / room).glob("*.py")):
            if room == "modeling_minillm" and path.stem in ("__init__", "__main__"):
                continue  # Doors: to everything, and to the command.
            for node in ast.walk(ast.parse(path.read_text("utf-8"))):
                if not isinstance(node, ast.ImportFrom) or not (node.module or "").startswith("minillm"):
                    continue
                package = ".".join(node.module.split(".")[:2])
                imported = folder_of.get(package, "modeling_minillm")
                if imported != room and floor_of[imported] <= floor_of[room] and node.module != "minillm.version":
                    wrong.append(f"{path.name}: {node.module}")
    assert wrong == []


def test_tests_stand_in_the_folder_of_their_room():
    rooms = {*setup_dict().values(), *PARTS_OF_THE_MODEL, "project"} - {"modeling_minillm"}
    folders = {path.parent.name for path in (ROOT / "tests").rglob("test_*.py")}
    assert folders == rooms
    assert [path.name for path in (ROOT / "tests").glob("*.py")] == ["conftest.py"]


def test_no_test_module_imports_another():
    modules = {path.stem for path in (ROOT / "tests").rglob("test_*.py")}
    for path in (ROOT / "tests").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.ImportFrom):
                assert (node.module or "").split(".")[-1] not in modules, path
            elif isinstance(node, ast.Import):
                assert not modules & {alias.name.split(".")[-1] for alias in node.names}, path


def test_public_names():
    assert sorted(minillm.__all__) == dir(minillm) == sorted(NAMES + ROOMS)
    with pytest.raises(AttributeError, match="MiniLLMForMaskedLM"):
        _ = minillm.MiniLLMForMaskedLM


def test_a_room_lists_what_it_exports():
    for room in ROOMS:
        found = getattr(minillm, room)
        assert set(found.__all__) <= set(dir(found)), room
    assert dir(minillm.publishing) == minillm.publishing.__all__


@pytest.mark.parametrize("room", ["cli", "experiments", "plugin"])
def test_a_room_of_modules_exports_none_of_them(room):
    names = {}
    exec(f"from minillm.{room} import *", names)
    assert set(names) == {"__builtins__"}


def test_rooms_are_attributes_without_an_import_of_their_own():
    code = f"import minillm\nprint([getattr(minillm, room).__name__ for room in {ROOMS}])"
    assert in_fresh_process(code) == str([f"minillm.{room}" for room in ROOMS])


def test_each_public_name_has_one_place():
    """A class of the front door is exported by no room, and no name by two rooms."""
    places = [(name, room) for room in ROOMS for name in getattr(minillm, room).__all__]
    places += [(name, "minillm") for name in NAMES]
    names = [name for name, _ in places]
    assert len(names) == len(set(names)), sorted(place for place in places if names.count(place[0]) > 1)
    for name, room in places:
        home = minillm if room == "minillm" else getattr(minillm, room)
        assert getattr(home, name) is not None


@pytest.mark.parametrize("auto_class", [AutoModel, AutoModelForCausalLM], ids=lambda cls: cls.__name__)
def test_auto_classes_know_the_models(auto_class):
    config = AutoConfig.for_model("minillm", vocab_size=8, hidden_size=8, num_hidden_layers=1, num_attention_heads=2)
    assert type(auto_class.from_config(config)).__name__.startswith("MiniLLM")


def in_fresh_process(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


HEAVY = {"torch", "transformers", "numpy", "peft", "datasets", "matplotlib", "trl", "lm_eval"}


def test_import_and_command_load_no_heavy_package():
    loaded = f"print(sorted(set({sorted(HEAVY)}) & set(sys.modules)))"
    code = "import sys; import {}; from contextlib import suppress\n{}\n" + loaded
    assert in_fresh_process(code.format("minillm", "minillm.__version__; dir(minillm)")) == "[]"
    help_of = "with suppress(SystemExit):\n    minillm.cli.main.app({})"
    for arguments in (["--help"], ["train", "--help"], ["evaluate", "--help"], ["tokenizer", "--help"]):
        told = in_fresh_process(code.format("minillm.cli.main", help_of.format(arguments)))
        assert "Usage" in told and told.splitlines()[-1] == "[]", arguments


def test_using_a_model_loads_no_more_than_it_needs():
    code = (
        "import sys; from transformers import LlamaForCausalLM, PreTrainedTokenizerFast; before = set(sys.modules)\n"
        "import minillm; minillm.MiniLLMForCausalLM; minillm.MiniLLMTokenizer\n"
        "print(sorted({'peft', 'datasets', 'matplotlib', 'trl', 'lm_eval', 'rich', 'typer'} & "
        "(set(sys.modules) - before)))"
    )
    assert in_fresh_process(code) == "[]"


ORDERS = [
    "import minillm, peft",
    "import peft, minillm",
    "import minillm; from transformers.models.llama import modeling_llama; import peft",
    "import minillm; from transformers import PreTrainedConfig, pipeline; import peft",
    "from minillm.configuration.configuration_minillm import MiniLLMConfig; import peft",
    "from minillm.tokenization import extend_vocabulary; import peft",
]


@pytest.mark.mostly_thorough("import minillm, peft", "import peft, minillm")
@pytest.mark.parametrize("order", ORDERS)
def test_everything_is_registered_in_any_order_of_imports(order):
    code = (
        f"{order}\nimport sys; import peft.utils.constants as tables\n"
        "found = [(name, table) for name, table in vars(tables).items() if name.startswith('TRANSFORMERS_MODELS_TO')"
        " and isinstance(table, dict) and 'llama' in table]\n"
        "print(len(found) > 20, all(table['minillm'] == table['llama'] for _, table in found))\n"
        "from transformers import AutoModelForCausalLM, AutoConfig\n"
        "from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS\n"
        "from transformers.models.auto import CONFIG_MAPPING, MODEL_MAPPING, TOKENIZER_MAPPING\n"
        "config = CONFIG_MAPPING['minillm']\n"
        "print(MODEL_MAPPING[config].__name__, 'minillm_blocks' in ALL_ATTENTION_FUNCTIONS)\n"
        "print('MiniLLMTokenizer' in str(TOKENIZER_MAPPING[config]), config.save_pretrained.__code__.co_filename)\n"
        "print([type(finder).__name__ for finder in sys.meta_path if 'AfterImport' in type(finder).__name__])\n"
        "import inspect, transformers.modeling_layers as module\n"
        "print(type(module.__loader__).__name__, type(module.__spec__.loader).__name__)\n"
    )
    assert in_fresh_process(code).splitlines() == [
        "True True",
        "MiniLLMModel True",
        f"True {hub.__file__}",
        "[]",
        "SourceFileLoader SourceFileLoader",
    ]


THREADS = """
import threading, minillm
from transformers import AutoModelForCausalLM
names = [name for name in minillm.__all__ if not name.startswith('__')] * 2
start, found = threading.Barrier(len(names)), []

def ask(name):
    start.wait()
    try:
        found.append(getattr(minillm, name) is not None)
    except BaseException as error:
        found.append(repr(error))

threads = [threading.Thread(target=ask, args=(name,)) for name in names]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
print({str(one) for one in found})
"""


@pytest.mark.slow
def test_threads_may_ask_for_public_names_at_once():
    assert in_fresh_process(THREADS) == in_fresh_process(THREADS.replace("from transformers", "# ")) == "{'True'}"


INTERRUPTED = """
import sys, minillm

class Interrupt:
    names = ["minillm.plugin.registration"]
    def find_spec(self, name, path=None, target=None):
        if name in self.names:
            self.names.remove(name)
            raise KeyboardInterrupt

sys.meta_path.insert(0, Interrupt())
try:
    minillm.MiniLLMForCausalLM
except KeyboardInterrupt:
    print(Interrupt.names)
"""
ENTERED = """
from transformers import AutoConfig, AutoModelForCausalLM
config = AutoConfig.for_model("minillm", vocab_size=8, hidden_size=8, num_hidden_layers=1, num_attention_heads=2)
model = AutoModelForCausalLM.from_config(config)
print(type(model) is minillm.MiniLLMForCausalLM, type(config) is minillm.MiniLLMConfig)
print(minillm.MiniLLMForCausalLM.save_pretrained.__code__.co_filename)
"""


def test_an_interrupted_registration_is_not_lost():
    assert in_fresh_process(INTERRUPTED + ENTERED).splitlines() == ["[]", "True True", hub.__file__]


RACE = """
import threading, minillm

def by_transformers():
    from transformers import AutoModelForCausalLM

def by_minillm():
    minillm.MiniLLMForCausalLM

# Either may fail, as threads do that import transformers at once.
threading.excepthook = lambda failure: None
threads = [threading.Thread(target=target) for target in (by_transformers, by_minillm)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
"""


@pytest.mark.slow
def test_a_registration_that_fails_in_a_race_is_not_lost():
    assert in_fresh_process(RACE + ENTERED).splitlines() == ["True True", hub.__file__]


def test_a_finder_that_has_left_finds_nothing():
    """Another thread may take it away while this one asks it."""
    assert AfterImport().find_spec("transformers.models", None) is None


def test_no_room_comes_in_by_the_front_door():
    """A thread that imports a room would wait for one that has come in by the door and waits for that room."""
    for folder in setup_dict().values():
        for path in (ROOT / folder).glob("*.py"):
            nodes = ast.walk(ast.parse(path.read_text("utf-8")))
            froms = [node for node in nodes if isinstance(node, ast.ImportFrom) and node.module == "minillm"]
            assert not [node for node in froms if path.name != "__init__.py"], path


@pytest.mark.slow
def test_too_old_transformers_is_refused_by_name():
    for use in ("minillm.MiniLLMConfig", "from transformers import AutoModel"):
        code = (
            "import transformers\ntransformers.__version__ = '5.0.0'\nimport minillm\n"
            f"try:\n    {use}\nexcept ImportError as error:\n    print(error)"
        )
        message = in_fresh_process(code)
        assert "5.17" in message and "5.0.0" in message and "pip install" in message, use


def test_version_is_one():
    assert version("minillm-hf") == minillm.__version__


def test_the_citation_names_this_version():
    assert f"version: {minillm.__version__}\n" in (ROOT / "CITATION.cff").read_text("utf-8")


# Imported under another name than they are installed by.
DISTRIBUTIONS = {"yaml": "pyyaml"}
# Looked for, and used if it is there; the page on performance says how it is installed.
NOT_DECLARED = {"liger_kernel"}


def test_what_is_imported_is_declared():
    imported = set()
    for folder in setup_dict().values():
        for path in (ROOT / folder).glob("*.py"):
            for node in ast.walk(ast.parse(path.read_text("utf-8"))):
                names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
                names += [node.module] if isinstance(node, ast.ImportFrom) and not node.level else []
                imported |= {name.partition(".")[0] for name in names}
    imported -= {*sys.stdlib_module_names, "minillm", *NOT_DECLARED}
    required = [line.lower() for line in requires("minillm-hf")]
    extras = {"train", "eval", "gguf", "report"}
    declared = {
        re.match(r"[\w-]+", line)[0].replace("-", "_")
        for line in required
        if "extra ==" not in line or any(f'extra == "{extra}"' in line for extra in extras)
    }
    assert {DISTRIBUTIONS.get(name, name).lower() for name in imported} <= declared


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
    "chat": "a command",
    "evaluate": "a command",
    "convert": "public: what `load` takes, and where to write",
}
"""Functions of more than 8 parameters, and why."""

LONG = "cli/train_command.py:train"
"""The command with most options, of which each has a line or more."""


def test_functions_are_short():
    rooms = [path for folder in setup_dict().values() for path in sorted((ROOT / folder).glob("*.py"))]
    functions = [function for path in rooms for function in functions_of(path, ROOT)]
    assert len(functions) > 500
    assert [function.place for function in functions if function.lines > MOST_LINES] == [LONG]
    many = {function.place.split(":")[1] for function in functions if function.parameters > MOST_PARAMETERS}
    assert many == set(MANY_PARAMETERS)
