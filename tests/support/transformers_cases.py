"""The tests that transformers runs on any of its models, on Llama and on MiniLLM; `transformers_common.py` runs this.

    python transformers_cases.py FOLDER CONTENDER RESULTS.json

The tests come from FOLDER, unpacked from the source distribution of the installed version. Mixins that its files
import and that are not distributed stand empty here.
"""

import importlib
import json
import sys
import types
import unittest
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from transformers import PretrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto

import minillm

FOLDER = Path(sys.argv[1])
SIZES = {
    "vocab_size": 99,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "num_labels": 3,
}
# The tests know by these tables of transformers' own classes which inputs a class takes, and whether it has a loss.
HEADS = {
    "Model": modeling_auto.MODEL_MAPPING_NAMES,
    "ForCausalLM": modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    "ForSequenceClassification": modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
    "ForTokenClassification": modeling_auto.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES,
    "ForQuestionAnswering": modeling_auto.MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES,
}
for head, table in HEADS.items():
    table["minillm"] = f"MiniLLM{head}"


class Undistributed(types.ModuleType):
    """In the place of a module that the source distribution lacks: every class of it is an empty one."""

    __path__: list[str] = []
    config_common_kwargs: dict[str, Any] = {}

    def __getattr__(self, name: str) -> type:
        if name.startswith("__"):
            raise AttributeError(name)
        value = type(name, (), {})
        setattr(self, name, value)
        return value


class UndistributedFinder:
    """Finds what no other finder of modules has found in the package of the unpacked tests."""

    def __init__(self) -> None:
        self.found: list[str] = []

    def find_spec(self, name: str, *args: Any) -> ModuleSpec | None:
        return ModuleSpec(name, self, is_package=True) if name.startswith(f"{FOLDER.name}.") else None

    def create_module(self, spec: ModuleSpec) -> types.ModuleType:
        return Undistributed(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        self.found.append(module.__name__.removeprefix(f"{FOLDER.name}."))


undistributed = UndistributedFinder()
sys.path.insert(0, str(FOLDER.parent))
sys.meta_path.append(undistributed)


def mixin(module: str, name: str) -> type:
    return getattr(importlib.import_module(f"{FOLDER.name}.{module}"), name)


class Tester(NamedTuple):
    """What the common tests ask of a model's tester: its config, its inputs and their sizes."""

    config_class: type[PretrainedConfig]
    classes: tuple[type[PreTrainedModel], ...]
    fields: dict[str, Any]
    batch_size: int = 13
    seq_length: int = 7
    is_training: bool = True
    hidden_size: int = SIZES["hidden_size"]
    num_hidden_layers: int = SIZES["num_hidden_layers"]
    num_attention_heads: int = SIZES["num_attention_heads"]

    @property
    def base_model_class(self) -> type[PreTrainedModel]:
        return self.classes[0]

    @property
    def causal_lm_class(self) -> type[PreTrainedModel]:
        return self.classes[1]

    @property
    def sequence_classification_class(self) -> type[PreTrainedModel]:
        return self.classes[2]

    def get_config(self) -> PretrainedConfig:
        return self.config_class(**SIZES, **self.fields)

    def prepare_config_and_inputs_for_common(self) -> tuple[PretrainedConfig, dict[str, torch.Tensor]]:
        ids = torch.randint(SIZES["vocab_size"], (self.batch_size, self.seq_length))
        return self.get_config(), {"input_ids": ids, "attention_mask": torch.ones_like(ids).tril()}


def tester_of(library: Any, name: str, **fields: Any) -> Tester:
    classes = tuple(getattr(library, name + head) for head in HEADS)
    return Tester(getattr(library, f"{name}Config"), classes, fields)


class CommonTests(
    mixin("test_modeling_common", "ModelTesterMixin"),
    mixin("generation.test_utils", "GenerationTesterMixin"),
    mixin("test_training_mixin", "TrainingTesterMixin"),
    mixin("test_tensor_parallel_mixin", "TensorParallelTesterMixin"),
):
    # Else they are checked of models of 2023 and later, by the copyright in their files.
    test_can_init_all_missing_weights_before_2023 = True

    def setUp(self):
        transformers.set_seed(0)
        self.config_tester = mixin("test_configuration_common", "ConfigTester")(
            self, config_class=self.model_tester.config_class, hidden_size=64, **self.model_tester.fields
        )

    @property
    def all_model_classes(self):
        return self.model_tester.classes

    def test_config(self):
        self.config_tester.run_common_tests()


class Llama(CommonTests, unittest.TestCase):
    model_tester = tester_of(transformers, "Llama")


class MiniLLMTests(CommonTests):
    def setUp(self):
        # SDPA has no probabilities to return: Llama leaves them out, MiniLLM refuses. This asks for them on its way.
        if self._testMethodName == "test_model_outputs_equivalence":
            fields = {**self.model_tester.fields, "attn_implementation": "eager"}
            self.model_tester = self.model_tester._replace(fields=fields)
        super().setUp()


class Causal(MiniLLMTests, unittest.TestCase):
    model_tester = tester_of(minillm, "MiniLLM")


class Prefix(MiniLLMTests, unittest.TestCase):
    model_tester = tester_of(minillm, "MiniLLM", attention_type="prefix")


class Alibi(MiniLLMTests, unittest.TestCase):
    model_tester = tester_of(minillm, "MiniLLM", position_embedding_type="alibi")


class Outcomes(unittest.TestResult):
    """What became of each test and of its parts: [test, part, outcome, why]; the part is "" for the whole."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[tuple[str, str, str, str]] = []

    def add(self, test: Any, outcome: str, why: str = "") -> None:
        whole = getattr(test, "test_case", test)
        part = "" if whole is test else test._subDescription().replace("MiniLLM", "").replace("Llama", "")
        self.rows.append((whole._testMethodName, part, outcome, why))

    def addSuccess(self, test: Any) -> None:
        self.add(test, "passed")

    def addSkip(self, test: Any, reason: str) -> None:
        self.add(test, "skipped", reason)

    def addError(self, test: Any, error: Any) -> None:
        self.add(test, "failed", f"{error[0].__name__}: {error[1]}")

    addFailure = addError

    def addSubTest(self, test: Any, subtest: Any, error: Any) -> None:
        self.addSuccess(subtest) if error is None else self.addError(subtest, error)


if __name__ == "__main__":
    torch.set_num_threads(1)
    outcomes = Outcomes()
    unittest.defaultTestLoader.loadTestsFromTestCase(globals()[sys.argv[2]]).run(outcomes)
    results = {"undistributed": undistributed.found, "rows": outcomes.rows}
    Path(sys.argv[3]).write_text(json.dumps(results), "utf-8")
