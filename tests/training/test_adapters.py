"""Adapters to a MiniLLM: their cards, and that they work from any folder and where MiniLLM is not installed."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hub_server import running_hub
from huggingface_hub import ModelCard, ModelCardData
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel, PrefixTuningConfig, get_peft_model
from safetensors.torch import load_file, save_file
from stranger_cases import tiny, tokenizer
from training_cases import collator_for, counting_documents, make_trainer
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from minillm import MiniLLMForSequenceClassification
from minillm.publishing.cards import is_repository, is_template
from minillm.training.collators import pack_dataset

IDS = torch.arange(5, 14)[None]
SETTINGS = {"task_type": "CAUSAL_LM", "r": 4, "lora_alpha": 12, "init_lora_weights": False}
DEFAULT_TARGETS = {"q_proj", "v_proj"}


def in_process(code, folder, environment=None, *arguments):
    """What a process prints, run in a folder."""
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        cwd=folder,
        env={**os.environ, "HF_HOME": str(folder / "home"), **(environment or {})},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


@pytest.fixture
def base(tmp_path):
    """The folder of a base model."""
    tiny().save_pretrained(tmp_path / "base")
    tokenizer().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def adapted(place, **settings):
    torch.manual_seed(3)
    model = place if isinstance(place, torch.nn.Module) else AutoModelForCausalLM.from_pretrained(place)
    return get_peft_model(model, LoraConfig(**{**SETTINGS, **settings})).eval()


def name_base(model, name):
    for config in model.peft_config.values():
        config.base_model_name_or_path = name
    return model


def saved_card(model, folder):
    model.save_pretrained(folder)
    return ModelCard.load(folder / "README.md")


def test_the_card_of_an_adapter_to_a_model_on_the_hub(tmp_path):
    model = tiny()
    # A model's page knows no licence of another.
    card = saved_card(name_base(adapted(model, modules_to_save=["lm_head"]), "user/base"), tmp_path)
    assert card.data.to_dict() == {
        "base_model": "user/base",
        "base_model_relation": "adapter",
        "library_name": "peft",
        "pipeline_tag": "text-generation",
        "tags": ["minillm", "lora"],
    }
    for words in (
        "[user/base](https://huggingface.co/user/base)",
        "**rank**: 4 (alpha 12, dropout 0.0)",
        "**changed modules**: q_proj, v_proj",
        "**modules trained whole**: lm_head",
        "pip install transformers peft",
        "pip install minillm-hf",
        'AutoModelForCausalLM.from_pretrained("user/base", trust_remote_code=True)',
        "minillm export user/base OUT --adapter",
    ):
        assert words in card.text, words


def test_the_card_of_an_adapter_to_a_folder_names_no_path(base, tmp_path):
    (base / "README.md").write_text("---\nlicense: mit\n---\n", "utf-8")
    card = saved_card(adapted(base), tmp_path / "adapter")
    assert card.data.base_model is None and card.data.get("base_model_relation") is None
    assert card.data.license == "mit"
    assert str(tmp_path) not in str(card) and "`base`" in card.text
    assert "PATH_OR_REPOSITORY_OF_THE_BASE_MODEL" in card.text


def test_the_licence_is_that_of_the_base_models_card_or_none(base, tmp_path):
    for number, (words, expected) in enumerate([("mine", None), ("---\n: [\n---\n", None), (None, None)]):
        (base / "README.md").unlink()
        if words is not None:
            (base / "README.md").write_text(words, "utf-8")
        assert saved_card(adapted(base), tmp_path / str(number)).data.license is expected
        (base / "README.md").touch()


def test_the_card_of_a_model_that_was_never_saved(tmp_path):
    card = saved_card(adapted(tiny()), tmp_path)
    assert "not yet saved" in card.text and card.data.base_model is None


def test_cards_of_other_methods_tasks_and_several_adapters(tmp_path):
    model = get_peft_model(tiny(), PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
    card = saved_card(model, tmp_path / "prefix")
    assert "prefix_tuning" in card.data.tags and "**virtual tokens**: 3" in card.text and "rank" not in card.text
    card = saved_card(adapted(tiny(MiniLLMForSequenceClassification), task_type="SEQ_CLS"), tmp_path / "classes")
    assert card.data.pipeline_tag == "text-classification"
    assert "AutoModelForSequenceClassification.from_pretrained" in card.text
    several = get_peft_model(tiny(), LoraConfig(**SETTINGS), adapter_name="first")
    several.add_adapter("second", LoraConfig(**{**SETTINGS, "r": 2, "target_modules": ["o_proj"]}))
    card = saved_card(several, tmp_path / "several")
    assert card.text.index("### first") < card.text.index("rank**: 4") < card.text.index("### second")
    assert card.text.index("### second") < card.text.index("rank**: 2") and 'subfolder="first"' in card.text
    assert (tmp_path / "several" / "first" / "adapter_config.json").exists()


def test_an_empty_template_is_replaced_and_ones_own_card_stays(base, tmp_path):
    stock = tmp_path / "stock"
    llama = LlamaForCausalLM(LlamaConfig(vocab_size=8, hidden_size=8, num_hidden_layers=1, num_attention_heads=2))
    get_peft_model(llama, LoraConfig(task_type="CAUSAL_LM")).save_pretrained(stock)
    # Another model's card is PEFT's.
    text = (stock / "README.md").read_text("utf-8")
    assert is_template(text) and "# Model Card for Model ID" in text
    model = name_base(adapted(base), "user/base")
    assert "# Adapter for a MiniLLM model" in saved_card(model, stock).text

    mine = tmp_path / "mine"
    mine.mkdir()
    own = "---\nlibrary_name: transformers\nbase_model: /home/me/base\nlicense: mit\ntags:\n- own\n---\n# Mine\n"
    (mine / "README.md").write_text(own, "utf-8")
    card = saved_card(model, mine)
    assert card.text.strip() == "# Mine"
    assert card.data.to_dict() == {
        "base_model": "user/base",
        "base_model_relation": "adapter",
        "library_name": "peft",
        "license": "mit",
        "tags": ["own", "minillm", "lora"],
    }
    # Without a repository to name, a path goes, and a name that somebody wrote stays.
    (mine / "README.md").write_text(own, "utf-8")
    assert saved_card(name_base(model, str(base)), mine).data.base_model is None
    (mine / "README.md").write_text(own.replace("/home/me/base", "user/mine"), "utf-8")
    assert saved_card(model, mine).data.base_model == "user/mine"
    for unreadable in ("plain words", "---\n: [\n---\n# Mine\n"):
        (mine / "README.md").write_text(unreadable, "utf-8")
        model.save_pretrained(mine)
        assert unreadable.strip() in (mine / "README.md").read_text("utf-8")


def test_a_template_in_which_somebody_wrote_is_none():
    empty = str(ModelCard.from_template(ModelCardData())).replace("---\n", "---\nlicense: mit\n", 1)
    assert is_template(empty) and is_template(f"{empty}\n### Framework versions\n\n- PEFT 0.18.0")
    assert not is_template(empty.replace("[More Information Needed]", "For answers.", 1))
    assert not is_template("# Mine") and not is_template("")


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("user/base", True),
        ("base", True),
        ("a/b/c", False),
        ("/base", False),
        ("./base", False),
        ("", False),
        (None, False),
    ],
)
def test_what_may_be_a_repository(name, expected, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert is_repository(name) == expected
    if expected:
        Path(name).mkdir(parents=True)
        assert not is_repository(name)


def test_the_trainers_card_stays_that_of_an_adapter(base, tmp_path):
    collator = collator_for("causal")
    rows = pack_dataset(counting_documents(8), collator)
    trainer = make_trainer(adapted(base), rows, collator, tmp_path / "out", max_steps=1)
    trainer.train()
    trainer.save_model()
    assert "# Adapter for a MiniLLM model" in (tmp_path / "out" / "README.md").read_text("utf-8")
    trainer.create_model_card()
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert card.data.library_name == "peft" and "minillm" in card.data.tags and card.data.base_model is None


@pytest.mark.parametrize("how", ["wrapped", "added"])
def test_an_adapter_works_from_any_working_folder(how, base, tmp_path, monkeypatch):
    monkeypatch.setattr("transformers.integrations.peft.check_peft_version", lambda **kwargs: None)
    monkeypatch.chdir(tmp_path)
    if how == "wrapped":
        model = adapted("base")
    else:
        model = AutoModelForCausalLM.from_pretrained("base")
        model.add_adapter(LoraConfig(**SETTINGS))
    model.save_pretrained(tmp_path / "adapter")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text("utf-8"))[
        "base_model_name_or_path"
    ] == str(base)
    expected = logits(model.eval())
    assert (expected - logits(tiny())).abs().max() > 1e-2
    for loader in (AutoModelForCausalLM, AutoPeftModelForCausalLM):
        torch.testing.assert_close(logits(loader.from_pretrained("../adapter").eval()), expected, rtol=0, atol=0)


def test_a_models_own_place_is_written_nowhere_else(base, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    AutoModelForCausalLM.from_pretrained("base").save_pretrained("again")
    for file in (tmp_path / "again").glob("*.json"):
        assert str(tmp_path) not in file.read_text("utf-8"), file


STRANGER = """
import sys
sys.modules["minillm"] = None
{first}
import torch
from transformers import AutoModelForCausalLM
ids = torch.arange(5, 14)[None]
base = AutoModelForCausalLM.from_pretrained("base", trust_remote_code=True)
from peft import IA3Config, LoraConfig, get_peft_model
torch.manual_seed(3)
model = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", r=4, init_lora_weights=False)).eval()
model.save_pretrained("adapter")
with torch.no_grad():
    from safetensors.torch import save_file
    save_file({{"logits": model(ids).logits}}, "logits.safetensors")
twin = AutoModelForCausalLM.from_pretrained("base", trust_remote_code=True)
get_peft_model(twin, IA3Config(task_type="CAUSAL_LM"))
print([type(finder).__name__ for finder in sys.meta_path].count("AfterImport"))
"""


@pytest.mark.slow
@pytest.mark.mostly_thorough("model-first")
@pytest.mark.parametrize("first", ["import peft", "import transformers"], ids=["peft-first", "model-first"])
def test_a_stranger_needs_no_targets(first, base, tmp_path):
    done = in_process(STRANGER.format(first=first), tmp_path)
    assert done.stdout.split()[-1] == "0"
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text("utf-8"))
    assert set(config["target_modules"]) == DEFAULT_TARGETS
    # The stranger's adapter, from another working folder, on the installed code.
    assert config["base_model_name_or_path"] == str(base)
    expected = load_file(tmp_path / "logits.safetensors")["logits"]
    assert torch.equal(logits(AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter").eval()), expected)


PUBLISH = """
import torch
import minillm
from huggingface_hub import HfApi, ModelCard, ModelCardData
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM
from transformers.utils.hub import create_and_tag_model_card
api = HfApi()

def upload(card, repo):
    api.create_repo(repo, exist_ok=True)
    api.upload_file(path_or_fileobj=str(card).encode(), path_in_repo="README.md", repo_id=repo)

folder = AutoModelForCausalLM.from_pretrained("base")
folder.push_to_hub("user/base")
AutoTokenizer.from_pretrained("base").push_to_hub("user/base")
settings = {"task_type": "CAUSAL_LM", "r": 4, "init_lora_weights": False}
base = AutoModelForCausalLM.from_pretrained("user/base")
model = get_peft_model(base, LoraConfig(**settings)).eval()
upload(ModelCard.from_template(ModelCardData()), "user/adapter")
model.push_to_hub("user/adapter", tags=["extra"])
upload("---\\ntags: []\\n---\\n# Mine", "user/mine")
model.push_to_hub("user/mine")
with torch.no_grad():
    save_file({"logits": model(torch.arange(5, 14)[None]).logits}, "logits.safetensors")
get_peft_model(folder, LoraConfig(**settings)).push_to_hub("user/of-a-folder")
llama = LlamaForCausalLM(LlamaConfig(vocab_size=8, hidden_size=8, num_hidden_layers=1, num_attention_heads=2))
get_peft_model(llama, LoraConfig(**settings)).push_to_hub("user/llama")
"""


@pytest.mark.slow
def test_a_stranger_loads_a_pushed_adapter_as_its_card_says(base, tmp_path):
    with running_hub(tmp_path / "hub") as environment:
        done = in_process(PUBLISH, tmp_path, environment)
        user = tmp_path / "hub" / "user"
        card = ModelCard.load(user / "adapter" / "README.md")
        code = card.text.partition("```python\n")[2].partition("```")[0]
        assert len([line for line in code.splitlines() if line]) == 5
        code = f"""
import sys
sys.modules["minillm"] = None
{code.replace("PATH_OR_REPOSITORY", "user/adapter")}
import torch
from safetensors.torch import load_file
with torch.no_grad():
    found = model.eval()(torch.arange(5, 14)[None]).logits
assert torch.equal(found, load_file("logits.safetensors")["logits"])
assert tokenizer("def")["input_ids"]
print(type(base).__module__.partition(".")[0])
"""
        stranger = in_process(code, tmp_path, {**environment, "HF_HOME": str(tmp_path / "strangers-home")})
    assert stranger.stdout.split()[-1] == "transformers_modules"
    assert (card.data.base_model, card.data.base_model_relation) == ("user/base", "adapter")
    assert card.data.tags == ["minillm", "lora", "extra"] and card.data.library_name == "peft"
    assert sorted(path.name for path in (user / "adapter").iterdir()) == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    assert "# Mine" in (user / "mine" / "README.md").read_text("utf-8")
    of_a_folder = ModelCard.load(user / "of-a-folder" / "README.md")
    assert of_a_folder.data.base_model is None and str(tmp_path) not in str(of_a_folder)
    told = [line for line in done.stderr.splitlines() if "which others cannot load" in line]
    assert len(told) == 1 and f"'default' is {base}" in told[0]
    assert "automatically generated" in (user / "llama" / "README.md").read_text("utf-8")


@pytest.mark.slow
def test_pushing_from_the_command_line(base, tmp_path):
    adapted(base).save_pretrained(tmp_path / "bare")
    adapted(base).save_pretrained(tmp_path / "adapter")
    tokenizer().save_pretrained(tmp_path / "adapter")
    tensors = load_file(tmp_path / "bare" / "adapter_model.safetensors")
    half = {name: tensor.to(torch.bfloat16) for name, tensor in tensors.items()}
    save_file(half, tmp_path / "bare" / "adapter_model.safetensors", metadata={"format": "pt"})
    code = """
import sys
from typer.testing import CliRunner
from minillm.cli.main import app
def call(*arguments, code=0):
    result = CliRunner().invoke(app, ["push", *arguments])
    assert result.exit_code == code, (result.output, result.exception)
    told = result.stderr if code else result.stdout
    assert len(told.splitlines()) == 1, result.output
    print(told, end="")
call("adapter", "user/refused", code=1)
call("base", "user/refused", "--base", "user/base", code=1)
call("base", "user/base")
call("adapter", "user/adapter", "--base", "user/base")
call("bare", "user/bare", "--base", "user/base")
"""
    with running_hub(tmp_path / "hub") as environment:
        lines = in_process(code, tmp_path, environment).stdout.splitlines()
    assert f"adapter is an adapter for {base}, which others cannot load" in lines[0]
    assert (
        f"`minillm push {base} user/base`" in lines[0] and f"`minillm export {base} OUT --adapter adapter`" in lines[0]
    )
    assert "--base user/base is for adapters, and base is a model" in lines[1]
    assert "/user/adapter/commit/" in lines[3] and "/user/bare/commit/" in lines[4]
    user = tmp_path / "hub" / "user"
    assert not (user / "refused").exists()
    for name in ("adapter", "bare"):
        pushed, local = user / name, tmp_path / name
        config, own = (json.loads((folder / "adapter_config.json").read_text("utf-8")) for folder in (pushed, local))
        assert config.pop("base_model_name_or_path") == "user/base" and own.pop("base_model_name_or_path") == str(base)
        for found in (config, own):
            found["target_modules"] = set(found["target_modules"])
        assert config == own
        found, expected = (load_file(folder / "adapter_model.safetensors") for folder in (pushed, local))
        assert found.keys() == expected.keys()
        # PEFT widens what is in half precision, which loses nothing.
        assert all(torch.equal(found[key], expected[key].float()) for key in found)
        assert ModelCard.load(pushed / "README.md").data.base_model == "user/base"
    assert (user / "adapter" / "tokenizer.json").exists() and not (user / "bare" / "tokenizer.json").exists()
    assert isinstance(PeftModel.from_pretrained(tiny(), user / "adapter"), PeftModel)
