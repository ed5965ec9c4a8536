"""Makes every saved folder loadable by a stranger who has transformers but not MiniLLM.

`install()` wraps the saving methods of config, tokenizer and model: beside what transformers writes, a folder gets the
Python files that define its classes, an `auto_map` that names them, a model card, and token ids that generation needs.
"""

import contextlib
import copy
import functools
import inspect
import os
import re
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, ModelCard, ModelCardData
from huggingface_hub.errors import HfHubHTTPError
from transformers import GenerationConfig
from transformers.utils import logging

from minillm.configuration.configuration_minillm import MiniLLMConfig
from minillm.import_hooks import after_import
from minillm.modeling_minillm import MiniLLMPreTrainedModel
from minillm.publishing.bundle import write_bundles
from minillm.publishing.cards import CARD_NAME, is_repository, is_template, model_card, write_adapter_card
from minillm.publishing.folders import updated_folder
from minillm.tokenization.tokenization_minillm import MiniLLMTokenizer

logger = logging.get_logger(__name__)

AUTO_MAP = {
    "AutoConfig": "configuration_minillm.MiniLLMConfig",
    "AutoModel": "modeling_minillm.MiniLLMModel",
    "AutoModelForCausalLM": "modeling_minillm.MiniLLMForCausalLM",
    "AutoModelForSequenceClassification": "modeling_minillm.MiniLLMForSequenceClassification",
    "AutoModelForTokenClassification": "modeling_minillm.MiniLLMForTokenClassification",
    "AutoModelForQuestionAnswering": "modeling_minillm.MiniLLMForQuestionAnswering",
}
# Of an older tokenizer, where the new one has none: transformers would read them beside the new one's files.
OUTDATED_TOKENIZER = (
    "chat_template.jinja",
    "additional_chat_templates",
    "special_tokens_map.json",
    "added_tokens.json",
)


def outdated_weights(variant: str | None, adapter: bool) -> Callable[[str], bool]:
    """Tells the weights of an older model by their names: left beside new ones, they could be taken for them."""
    middle = f".{re.escape(variant)}" if variant else ""
    whole = "adapter_model" if adapter else "model"
    pattern = re.compile(
        rf"{whole}{middle}(-\d{{5}}-of-\d{{5}})?\.safetensors|{whole}\.safetensors\.index{middle}\.json"
    )
    return lambda name: pattern.fullmatch(name) is not None


def completed_generation_config(model: MiniLLMPreTrainedModel) -> GenerationConfig:
    """A copy of a model's generation config with end and padding ids; without a padding token the end token pads."""
    generation = copy.deepcopy(model.generation_config)
    if generation.eos_token_id is None:
        generation.eos_token_id = model.config.eos_token_id
    if generation.pad_token_id is None:
        ends = generation.eos_token_id
        first_end = ends[0] if isinstance(ends, list) else ends
        generation.pad_token_id = first_end if model.config.pad_token_id is None else model.config.pad_token_id
    return generation


@contextlib.contextmanager
def completed(model: MiniLLMPreTrainedModel) -> Iterator[None]:
    """The model has a complete generation config; afterwards its own: saving must not change what it generates."""
    if not model.can_generate():
        yield
        return
    own, model.generation_config = model.generation_config, completed_generation_config(model)
    try:
        yield
    finally:
        model.generation_config = own


def save_then_push(save: Callable, obj: Any, folder: Any, kwargs: dict[str, Any]) -> Any:
    """Saves, and only then uploads: the stock way uploads by time stamps and would miss files written around it."""
    result = save(obj, folder, **kwargs["save"])
    repo_id = kwargs["push"].pop("repo_id", None) or Path(folder).name
    obj.push_to_hub(repo_id, **kwargs["push"])
    return result


def split_push(kwargs: dict[str, Any]) -> dict[str, dict[str, Any]]:
    names = ("repo_id", "commit_message", "commit_description", "private", "revision", "create_pr")
    push = {name: kwargs.pop(name) for name in names if name in kwargs}
    if kwargs.get("token") is not None:
        push["token"] = kwargs["token"]
    return {"push": push, "save": kwargs}


def config_save(save: Callable) -> Callable:
    @functools.wraps(save)
    def save_pretrained(self: MiniLLMConfig, save_directory: Any, push_to_hub: bool = False, **kwargs: Any) -> Any:
        if push_to_hub:
            return save_then_push(type(self).save_pretrained, self, save_directory, split_push(kwargs))
        self.auto_map = dict(AUTO_MAP)
        if os.path.isfile(save_directory):
            # Refused there.
            return save(self, save_directory, **kwargs)
        with updated_folder(save_directory, outdated=lambda name: False) as folder:
            result = save(self, folder, **kwargs)
            write_bundles(folder, "modeling_minillm")
        return result

    return save_pretrained


def tokenizer_save(save: Callable) -> Callable:
    @functools.wraps(save)
    def save_pretrained(
        self: MiniLLMTokenizer, save_directory: Any, *args: Any, push_to_hub: bool = False, **kwargs: Any
    ) -> Any:
        if push_to_hub:
            return save_then_push(type(self).save_pretrained, self, save_directory, split_push(kwargs))
        self._auto_map = {"AutoTokenizer": [None, "tokenization_minillm.MiniLLMTokenizer"]}
        if os.path.isfile(save_directory):
            return save(self, save_directory, *args, **kwargs)
        prefix = kwargs.get("filename_prefix", args[1] if len(args) > 1 else None)
        outdated = () if prefix else OUTDATED_TOKENIZER
        with updated_folder(save_directory, outdated.__contains__) as folder:
            files = save(self, folder, *args, **kwargs)
            write_bundles(folder, "tokenization_minillm")
        return tuple(str(Path(save_directory, Path(file).relative_to(folder))) for file in files)

    return save_pretrained


def model_save(save: Callable) -> Callable:
    @functools.wraps(save)
    def save_pretrained(
        self: MiniLLMPreTrainedModel,
        save_directory: Any,
        is_main_process: bool = True,
        *args: Any,
        push_to_hub: bool = False,
        **kwargs: Any,
    ) -> Any:
        if push_to_hub:
            return save_then_push(type(self).save_pretrained, self, save_directory, split_push(kwargs))
        writes = is_main_process and self.should_save_on_this_rank(is_main_process)
        is_adapter = getattr(self, "_hf_peft_config_loaded", False)
        given = inspect.signature(save).bind(self, save_directory, is_main_process, *args, **kwargs).arguments
        if not writes or given.get("distributed_checkpoint") or os.path.isfile(save_directory):
            # Of a distributed checkpoint each process writes its own part.
            with completed(self):
                result = save(self, save_directory, is_main_process, *args, **kwargs)
        else:
            outdated = outdated_weights(given.get("variant"), is_adapter)
            with updated_folder(save_directory, outdated) as folder, completed(self):
                result = save(self, folder, is_main_process, *args, **kwargs)
                if not (Path(save_directory) / CARD_NAME).exists():
                    if is_adapter:
                        # transformers saves one, whatever its name is, as if it were the only one.
                        write_adapter_card(self, {"default": self.peft_config[self.active_adapters()[0]]}, folder)
                    else:
                        model_card(self).save(folder / CARD_NAME)
        # Transformers' own barrier came before the files had their place.
        self.barrier_after_gathered_checkpoint_save(getattr(self.config, "distributed_config", None))
        return result

    return save_pretrained


def create_branch(api: HfApi, repo_id: str, revision: str | None, create_pr: bool) -> None:
    """Makes the branch to upload to, unless it is there or `revision` is a pull request."""
    if revision is None or revision.startswith("refs/pr"):
        return
    try:
        api.create_branch(repo_id=repo_id, branch=revision, exist_ok=True)
    except HfHubHTTPError as error:
        # Whoever may only propose changes cannot make branches, and need not.
        if not (create_pr and error.response.status_code == 403):
            raise


def settle_card(api: HfApi, repo_id: str, revision: str | None, path: Path, tags: list[str] | None) -> None:
    """Keeps the repository's card in the place of the saved one, unless it is the empty template; adds the tags."""
    if api.file_exists(repo_id, CARD_NAME, revision=revision):
        text = Path(api.hf_hub_download(repo_id, CARD_NAME, revision=revision)).read_text("utf-8")
        if not is_template(text) or not path.exists():
            path.write_text(text, "utf-8")
    if tags:
        bare = f"---\n{ModelCardData(library_name='transformers').to_yaml()}\n---\n"
        card = ModelCard.load(path) if path.exists() else ModelCard(bare)
        card.data["tags"] = list(dict.fromkeys([*(card.data.get("tags") or []), *tags]))
        card.save(path)


def push_to_hub(
    self: Any,
    repo_id: str,
    *,
    commit_message: str | None = None,
    commit_description: str | None = None,
    private: bool | None = None,
    token: bool | str | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    max_shard_size: int | str | None = "50GB",
    tags: list[str] | None = None,
) -> str:
    """Uploads what `save_pretrained` writes: for a model or an adapter also its card, unless the repository has one of
    its own.

    Arguments and result are those of `transformers.PreTrainedModel.push_to_hub`.
    """
    api = HfApi(token=token)
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    create_branch(api, repo_id, revision, create_pr)
    with tempfile.TemporaryDirectory() as folder:
        self.save_pretrained(folder, max_shard_size=max_shard_size)
        settle_card(api, repo_id, revision, Path(folder) / CARD_NAME, tags)
        kinds = {MiniLLMConfig: "config", MiniLLMTokenizer: "tokenizer"}
        return api.upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            commit_message=commit_message or f"Upload {kinds.get(type(self), 'model')}",
            commit_description=commit_description,
            revision=revision,
            create_pr=create_pr,
        )


def give_adapters_cards() -> None:
    """Has PEFT write and upload our card for an adapter to a MiniLLM, where its own is an empty template that names a
    folder as the base model, or, in an upload, no base model at all. Once."""
    from peft import PeftModel as cls

    if "push_to_hub" in vars(cls):
        return
    stock_card, stock_push = cls.create_or_update_model_card, cls.push_to_hub

    @functools.wraps(stock_card)
    def create_or_update_model_card(self: Any, output_dir: str) -> None:
        model = self.get_base_model()
        if not isinstance(model, MiniLLMPreTrainedModel):
            return stock_card(self, output_dir)
        return write_adapter_card(model, self.peft_config, output_dir)

    @functools.wraps(stock_push)
    def push(self: Any, repo_id: str, **kwargs: Any) -> Any:
        if not isinstance(self.get_base_model(), MiniLLMPreTrainedModel):
            return stock_push(self, repo_id, **kwargs)
        for name, config in self.peft_config.items():
            if not is_repository(base := config.base_model_name_or_path):
                logger.warning(
                    f"The base model of the adapter {name!r} is {base or 'not named'}, which others cannot load: "
                    "upload it, set `peft_config[...].base_model_name_or_path` to its repository, and push again."
                )
        return push_to_hub(self, repo_id, **kwargs)

    cls.create_or_update_model_card, cls.push_to_hub = create_or_update_model_card, push


def install() -> None:
    """Wraps the saving methods and replaces the uploading one, of each class once."""
    classes = {MiniLLMConfig: config_save, MiniLLMTokenizer: tokenizer_save, MiniLLMPreTrainedModel: model_save}
    for cls, wrapped in classes.items():
        if "push_to_hub" not in vars(cls):
            cls.save_pretrained = wrapped(cls.save_pretrained)
            cls.push_to_hub = push_to_hub
    after_import.call(give_adapters_cards, "peft.peft_model")
