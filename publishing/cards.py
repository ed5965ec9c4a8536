"""The cards of models and adapters: what stands there, and how it is loaded with and without MiniLLM."""

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeGuard

import yaml
from huggingface_hub import ModelCard, ModelCardData, try_to_load_from_cache

from minillm.modeling_minillm import MiniLLMPreTrainedModel
from minillm.publishing.description import adapter_kind, describe, describe_adapter, is_mergeable

TASKS = {
    "MiniLLMForCausalLM": ("text-generation", "AutoModelForCausalLM"),
    "MiniLLMForSequenceClassification": ("text-classification", "AutoModelForSequenceClassification"),
    "MiniLLMForTokenClassification": ("token-classification", "AutoModelForTokenClassification"),
    "MiniLLMForQuestionAnswering": ("question-answering", "AutoModelForQuestionAnswering"),
    "MiniLLMModel": ("feature-extraction", "AutoModel"),
}
DEFAULT_LICENSE = "apache-2.0"
CARD_NAME = "README.md"
SUMMARY_HEADING = "## Training"
# In the empty template that transformers uploads, where MiniLLM is not imported: ours says more.
STOCK_CARD_PHRASE = "This model card has been automatically generated"
# Where PEFT fills in the same template.
PEFT_HEADING = "### Framework versions"
HEADER = re.compile(r"\A\s*---\n.*?\n---[ \t]*\n", re.DOTALL)
REPOSITORY = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?", re.ASCII)


def is_template(text: str) -> bool:
    """Whether a card is the empty template of transformers or PEFT, in which nobody has written."""
    empty = str(ModelCard.from_template(ModelCardData()))
    return STOCK_CARD_PHRASE in text or words_of(text) == words_of(empty)


def words_of(card: str) -> list[str]:
    """What stands below the header of a card, and above what PEFT adds."""
    return HEADER.sub("", card).partition(PEFT_HEADING)[0].split()


def read_card(text: str) -> ModelCard | None:
    """The card in a file; None if its header is no YAML."""
    try:
        return ModelCard(text)
    except (ValueError, yaml.YAMLError):
        return None


def bullets(topics: Mapping[str, str]) -> str:
    return "\n".join(f"- **{topic}**: {phrase}" for topic, phrase in topics.items())


def summary_of(model: MiniLLMPreTrainedModel) -> str:
    """The part of a card, below an empty line, that says how a model was trained, where its trainer has left one on it
    as `training_summary`."""
    summary = getattr(model, "training_summary", None)
    return f"\n{summary}" if summary else ""


def read_summary(folder: str | Path) -> str | None:
    """That part of the card in a folder: what stands below its heading, up to the next one."""
    file = Path(folder) / CARD_NAME
    if not file.is_file():
        return None
    found = re.search(
        rf"^{SUMMARY_HEADING}\n.*?(?=^#|\Z)", file.read_text("utf-8", "replace"), re.MULTILINE | re.DOTALL
    )
    return found and found[0].rstrip() + "\n"


def task_of(model: MiniLLMPreTrainedModel) -> tuple[str, str]:
    """The task of a model on the Hub, and the Auto class that loads it."""
    return TASKS.get(type(model).__name__, TASKS["MiniLLMModel"])


def model_card(model: MiniLLMPreTrainedModel) -> ModelCard:
    """A card that says what the model is and how to load it, with and without MiniLLM."""
    config = model.config
    task, auto_class = task_of(model)
    tags = ["minillm", config.attention_type, config.position_embedding_type, *(model.model_tags or [])]
    data = ModelCardData(
        library_name="transformers",
        pipeline_tag=task,
        license=DEFAULT_LICENSE,
        tags=list(dict.fromkeys(tags)),
    )
    return ModelCard(
        f"""---
{data.to_yaml()}
---

# MiniLLM model

A [transformers](https://github.com/huggingface/transformers) model with {model.num_parameters():,} parameters, made
with MiniLLM {config.minillm_version}.

{bullets(describe(config))}

## How to load it

The code is in this repository, so transformers is enough:

```python
from transformers import AutoTokenizer, {auto_class}

model = {auto_class}.from_pretrained("PATH_OR_REPOSITORY", trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained("PATH_OR_REPOSITORY", trust_remote_code=True)
```

With `pip install minillm-hf` and `import minillm` it loads without `trust_remote_code`.
{summary_of(model)}"""
    )


def is_repository(base: str | None) -> TypeGuard[str]:
    """Whether the base model that an adapter names is one on the Hub, and no folder."""
    return bool(base) and REPOSITORY.fullmatch(base) is not None and not os.path.isdir(base)


def license_of(base: str | None) -> str | None:
    """The licence on a base model's card, in its folder or in the cache of the Hub; None where it cannot be read."""
    if not base:
        return None
    card = try_to_load_from_cache(base, CARD_NAME) if is_repository(base) else Path(base) / CARD_NAME
    if not isinstance(card, (str, Path)) or not Path(card).is_file():
        return None
    found = read_card(Path(card).read_text("utf-8"))
    return None if found is None else found.data.get("license")


def adapter_card(model: MiniLLMPreTrainedModel, configs: Mapping[str, Any]) -> ModelCard:
    """A card that says what adapters change, of which model, and how to load them.

    Args:
        model: the base model.
        configs: the adapters' `PeftConfig`s by name; all but `"default"` stand in a sub-folder of their name.
    """
    base = next(iter(configs.values())).base_model_name_or_path or ""
    shared = is_repository(base)
    task, auto_class = task_of(model)
    kinds = [adapter_kind(config.to_dict()).lower() for config in configs.values()]
    tags = ["minillm", *kinds, *(model.model_tags or [])]
    # The Hub shows the adapter on the page of its base by these two fields; a path in the first it refuses.
    links: dict[str, Any] = {"base_model": base, "base_model_relation": "adapter"} if shared else {}
    data = ModelCardData(
        library_name="peft",
        pipeline_tag=task,
        license=license_of(base),
        tags=list(dict.fromkeys(tags)),
        **links,
    )
    sections = [
        ("" if name == "default" else f"### {name}\n\n") + bullets(describe_adapter(config.to_dict()))
        for name, config in configs.items()
    ]
    found = "\n\n".join(sections)
    first = next(iter(configs))
    folder = "" if first == "default" else f', subfolder="{first}"'
    place = base if shared else "PATH_OR_REPOSITORY_OF_THE_BASE_MODEL"
    merged = ""
    # The command takes the adapter in the folder itself.
    if first == "default" and is_mergeable(configs[first].to_dict()):
        merged = f", and\n`minillm export {place} OUT --adapter PATH_OR_REPOSITORY` makes one model of both"
    return ModelCard(
        f"""---
{data.to_yaml()}
---

# Adapter for a MiniLLM model

Made with [PEFT](https://github.com/huggingface/peft) for {base_in_words(base)}.

{found}

## How to load it

The code is in the base model's repository, so `pip install transformers peft` is enough:

```python
from peft import PeftModel
from transformers import AutoTokenizer, {auto_class}

base = {auto_class}.from_pretrained("{place}", trust_remote_code=True)
model = PeftModel.from_pretrained(base, "PATH_OR_REPOSITORY"{folder})
tokenizer = AutoTokenizer.from_pretrained("{place}", trust_remote_code=True)
```

With `pip install minillm-hf` and `import minillm` it loads without `trust_remote_code`{merged}.
{summary_of(model)}"""
    )


def base_in_words(base: str) -> str:
    if is_repository(base):
        return f"[{base}](https://huggingface.co/{base})"
    if not base:
        return "a model that was not yet saved when it was adapted"
    return f"a model in the folder `{Path(base).name}` of whoever made it"


def write_adapter_card(model: MiniLLMPreTrainedModel, configs: Mapping[str, Any], folder: str | Path) -> None:
    """Writes the card of adapters; of one that somebody wrote the words stay, and its metadata follow.

    Args:
        model, configs: as for `adapter_card`.
    """
    written, file = adapter_card(model, configs), Path(folder) / CARD_NAME
    card = written
    if file.exists() and not is_template(text := file.read_text("utf-8")):
        card = read_card(text)
        if card is None:
            return
        if not is_repository(card.data.get("base_model")):
            card.data.pop("base_model")
        for name in ("library_name", "base_model", "base_model_relation"):
            if (value := written.data.get(name)) is not None:
                card.data[name] = value
        card.data["tags"] = list(dict.fromkeys([*(card.data.get("tags") or []), *written.data.get("tags")]))
    card.save(file)
