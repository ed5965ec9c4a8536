"""Saved folders load, compute and save again where MiniLLM is not installed."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hub_server import running_hub
from peft import LoraConfig, get_peft_model
from stranger_cases import SIZE, TEXT, expectation, model_case, tiny, tokenizer, visit
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments
from variants import variants

import minillm
from minillm import MiniLLMConfig, MiniLLMForCausalLM, MiniLLMTokenizer
from minillm.publishing.bundle import ROOTS, modules_of

VARIANTS = variants(
    "causal prefix-gqa alibi prefix-glm_2d-layernorm-mlp-tied deepnorm-sandwich norm_head-embedding_norm-qk_norm moe"
)
HEADS = {
    "AutoModel": minillm.MiniLLMModel,
    "AutoModelForSequenceClassification": minillm.MiniLLMForSequenceClassification,
    "AutoModelForTokenClassification": minillm.MiniLLMForTokenClassification,
    "AutoModelForQuestionAnswering": minillm.MiniLLMForQuestionAnswering,
}


@pytest.mark.slow
def test_a_stranger_loads_every_class_and_variant(tmp_path):
    cases = []
    for name, fields in VARIANTS.items():
        model = tiny(**fields)
        model.save_pretrained(tmp_path / name)
        cases.append(model_case(name, model, tmp_path / name))
    for auto_class, cls in HEADS.items():
        model = tiny(cls)
        model.save_pretrained(tmp_path / auto_class)
        cases.append(model_case(auto_class, model, tmp_path / auto_class, auto_class))
    # A base model inside a causal language model's folder, as some servers ask for it.
    tiny().save_pretrained(tmp_path / "base-of-causal")
    cases.append(model_case("base-of-causal", tiny().model, tmp_path / "base-of-causal", "AutoModel"))
    config = MiniLLMConfig(**SIZE)
    config.save_pretrained(tmp_path / "config")
    parameters = MiniLLMForCausalLM(config).num_parameters()
    folder = str(tmp_path / "config")
    cases.append(
        {
            "name": "config",
            "folder": folder,
            "auto_class": "AutoConfig",
            "parameters": parameters,
            "change": {"norm_placement": "post", "num_attention_heads": 8},
            "followed": {"final_norm": False, "num_key_value_heads": 8, "head_dim": 4},
        }
    )
    saved = tokenizer()
    saved.save_pretrained(tmp_path / "tokenizer")
    cases.append(
        {
            "name": "tokenizer",
            "folder": str(tmp_path / "tokenizer"),
            "auto_class": "AutoTokenizer",
            "text": TEXT,
            "ids": saved(TEXT)["input_ids"],
            "named": [saved.gmask_token_id, saved.pad_token_id],
        }
    )
    assert visit(cases, tmp_path) == {case["name"]: "equal" for case in cases}


@pytest.mark.slow
def test_a_stranger_loads_what_trainer_and_lora_leave(tmp_path):
    ids = [list(range(5, 25))] * 8
    data = [{"input_ids": row, "labels": row} for row in ids]
    arguments = TrainingArguments(str(tmp_path / "checkpoints"), max_steps=2, report_to="none", use_cpu=True)
    trainer = Trainer(tiny(), arguments, train_dataset=data, processing_class=tokenizer())
    trainer.train()
    trainer.save_model(str(tmp_path / "trained"))
    adapted = get_peft_model(tiny(), LoraConfig(r=2, task_type="CAUSAL_LM", init_lora_weights=False))
    merged = adapted.merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    cases = [
        model_case("trained", trainer.model.eval(), tmp_path / "trained"),
        model_case("merged", merged.eval(), tmp_path / "merged"),
    ]
    assert visit(cases, tmp_path) == {"trained": "equal", "merged": "equal"}
    assert (tmp_path / "trained" / "tokenizer.json").exists()


def test_a_stranger_fills_and_scores_blanks(tmp_path):
    model, names = tiny(**VARIANTS["prefix-glm_2d-layernorm-mlp-tied"]), tokenizer()
    model.save_pretrained(tmp_path / "model")
    names.save_pretrained(tmp_path / "model")
    text, candidates = "def 你好[MASK]:  return 'hello'\n", ["(world)", "world"]
    found = [
        model.fill(text, names, max_new_tokens=6, do_sample=False).texts,
        model.score_fills(text, candidates, names).tolist(),
        dict(names.build_glm_inputs(text, candidates[:1])),
    ]
    folder = str(tmp_path / "model")
    case = {"auto_class": "fill", "folder": folder, "text": text, "candidates": candidates, "found": found}
    assert visit([{"name": "fill", **case}], tmp_path) == {"fill": "equal"}


def test_with_minillm_the_same_folder_loads_without_remote_code(tmp_path):
    model = tiny()
    model.save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    for auto_class, cls in ((AutoModelForCausalLM, MiniLLMForCausalLM), (AutoModel, minillm.MiniLLMModel)):
        assert type(auto_class.from_pretrained(tmp_path)) is cls
    assert type(AutoConfig.from_pretrained(tmp_path)) is MiniLLMConfig
    assert type(AutoTokenizer.from_pretrained(tmp_path)) is MiniLLMTokenizer
    assert type(AutoModelForCausalLM.from_pretrained(tmp_path, trust_remote_code=True)) is MiniLLMForCausalLM


PUSH = """
import sys, torch
import minillm
from minillm import MiniLLMForCausalLM, MiniLLMTokenizer, MiniLLMConfig
from transformers import AutoModelForCausalLM
model = MiniLLMForCausalLM.from_pretrained(sys.argv[1])
tokenizer = MiniLLMTokenizer.from_pretrained(sys.argv[1])
model.push_to_hub("user/model", tags=["extra"])
tokenizer.push_to_hub("user/model")
model.config.save_pretrained("config-folder", push_to_hub=True, repo_id="user/config")
tokenizer.save_pretrained("tokenizer-folder", push_to_hub=True, repo_id="user/tokenizer")
model.save_pretrained("model-folder", push_to_hub=True, repo_id="user/saved")
again = AutoModelForCausalLM.from_pretrained("user/model")
same = all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values()))
print(type(again).__name__, same)
"""


@pytest.mark.slow
def test_hub_over_http(tmp_path):
    model = tiny(attention_type="prefix")
    model.save_pretrained(tmp_path / "local")
    tokenizer().save_pretrained(tmp_path / "local")
    with running_hub(tmp_path / "hub") as environment:
        done = subprocess.run(
            [sys.executable, "-c", PUSH, str(tmp_path / "local")],
            cwd=tmp_path,
            env={**os.environ, **environment},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        assert done.stdout.split() == ["MiniLLMForCausalLM", "True"]
        expected = expectation(model, tmp_path / "hub-case")
        case = {"name": "hub", "folder": "user/model", "auto_class": "AutoModelForCausalLM", "expected": expected}
        assert visit([case], tmp_path, {**environment, "HF_HOME": str(tmp_path / "fresh")}) == {"hub": "equal"}
    for repository in ("model", "config", "tokenizer", "saved"):
        names = {path.name for path in (tmp_path / "hub" / "user" / repository).iterdir()}
        assert any(name.endswith("_minillm.py") for name in names), (repository, names)
        assert not [name for name in names if name.endswith((".bin", ".pt", ".pkl"))]
    card = (tmp_path / "hub" / "user" / "model" / "README.md").read_text("utf-8")
    assert "extra" in card and "trust_remote_code=True" in card and "automatically generated" not in card


def write_file_by_file(folder: Path) -> None:
    """The Python files as MiniLLM 0.1 wrote them: each module by itself, importing the others relatively."""
    for path in folder.glob("*.py"):
        for module in modules_of(ROOTS[path.stem]):
            text = re.sub(
                r"^from minillm(\.\w+)*\.(\w+) import", r"from .\2 import", "\n".join(module.lines), flags=re.M
            )
            (folder / f"{module.name.rpartition('.')[2]}.py").write_text(text, "utf-8")


def test_a_folder_of_many_files_still_loads(tmp_path):
    model = tiny(**VARIANTS["prefix-glm_2d-layernorm-mlp-tied"])
    model.save_pretrained(tmp_path / "old")
    tokenizer().save_pretrained(tmp_path / "old")
    write_file_by_file(tmp_path / "old")
    assert len(list((tmp_path / "old").glob("*.py"))) > 30
    case = model_case("old", model, tmp_path / "old")
    assert visit([case], tmp_path) == {"old": "equal"}
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "old")
    assert all(torch.equal(one, other) for one, other in zip(model.parameters(), again.parameters(), strict=True))


@pytest.mark.parametrize("name", ["causal", "prefix-glm_2d-layernorm-mlp-tied"])
def test_a_published_folder_holds_no_pickle_and_all_it_needs(tmp_path, name):
    tiny(**VARIANTS[name]).save_pretrained(tmp_path)
    names = {path.name for path in tmp_path.iterdir()}
    assert {"config.json", "generation_config.json", "model.safetensors", "README.md"} <= names
    assert {file for file in names if file.endswith(".py")} == {"configuration_minillm.py", "modeling_minillm.py"}
    assert not [name for name in names if name.endswith((".bin", ".pt", ".pkl", ".pth"))]
