"""What a folder holds beside weights and config: tokenizer and generation config, copied or made plain.

No link that leads out of the source folder is followed: what is copied is soon published.
"""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import transformers
from tokenizers import Tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerFast
from transformers.dynamic_module_utils import get_relative_import_files
from transformers.utils import logging

from minillm.conversion.family import NAMED_IDS, ConversionError, real_ids
from minillm.conversion.files import exists, read_json, read_settings, require_file, require_text
from minillm.tokenization.tokenization_minillm import MiniLLMTokenizer

logger = logging.get_logger(__name__)

GENERATION_CONFIG_NAME = "generation_config.json"
TOKENIZER_CONFIG_NAME = "tokenizer_config.json"
TOKENIZER_NAME = "tokenizer.json"
TOKENIZER_FILES = (
    TOKENIZER_NAME,
    TOKENIZER_CONFIG_NAME,
    *"special_tokens_map.json added_tokens.json vocab.json vocab.txt merges.txt tokenizer.model spiece.model "
    "sentencepiece.bpe.model chat_template.jinja chat_template.json".split(),
)
MORE_TEMPLATES = "additional_chat_templates"
"""The folder of chat templates beside the first one, as transformers writes it."""

# One text of each kind that tokenizers treat in ways of their own: cases, digits, blanks, accents, scripts, line ends.
PROBES = (
    "Hello world, it's 2024!",
    "  two  blanks,\ttabs\nand\r\nlines \n\n",
    "naïve Straße ΑΒΓ привет 你好，世界 \U0001f600 \u2581",
    "def f(x):\n    return x ** 2  # 1,234.5",
)


def carried_files(folder: Path) -> dict[str, Path]:
    """What carries a tokenizer and the way of generating, without code: name to file.

    Raises:
        ConversionError: a file is damaged, or a link that leads out of the folder.
    """
    templates = sorted(path.name for path in (folder / MORE_TEMPLATES).glob("*.jinja"))
    names = [*TOKENIZER_FILES, *(f"{MORE_TEMPLATES}/{name}" for name in templates), GENERATION_CONFIG_NAME]
    found = {name: file for name in names if (file := own_file(folder, name)) is not None}
    read_settings(folder, [name for name in found if name.endswith(".json")])
    for name, file in found.items():
        if name.endswith((".jinja", ".txt")):
            require_text(file)
    if TOKENIZER_NAME in found:
        try:
            Tokenizer.from_str(found[TOKENIZER_NAME].read_text("utf-8"))
        except Exception as error:  # The back end raises nothing more specific.
            raise ConversionError(f"{found[TOKENIZER_NAME]} is damaged: {error}") from error
    return found


def carry_over(source: Path, target: Path) -> None:
    """Copies tokenizer and generation config, with the code that the tokenizer's config names.

    Raises:
        ConversionError: a file is a link that leads out of the folder.
    """
    copy_files(source, target)
    for module in named_modules(target):
        for file in module_files(source, module):
            if not (target / file.name).exists():
                shutil.copyfile(file, target / file.name)


def carry_over_plainly(source: Path, target: Path) -> None:
    """Copies tokenizer and generation config for a folder without code: the tokenizer becomes one of transformers.

    A tokenizer of MiniLLM, or of the folder's own code, becomes the stock one of its `tokenizer.json`; without that
    file it is left out, and the log says so. The written tokenizer is compared with the source's.

    Args:
        target: holds the config of the written model already, which has a say in how a tokenizer is loaded.

    Raises:
        ConversionError: a file is a link that leads out of the folder, or the written tokenizer reads text otherwise.
    """
    copy_files(source, target)
    if not (target / TOKENIZER_CONFIG_NAME).exists():
        return
    settings = read_json(target / TOKENIZER_CONFIG_NAME)
    kind = settings.get("tokenizer_class")
    is_stock = kind is None or hasattr(transformers, kind)
    if "auto_map" in settings or not is_stock:
        if not (target / TOKENIZER_NAME).exists():
            remove_tokenizer(target)
            logger.warning(
                f"The tokenizer of {source} was left out: it is code of its own ({kind}) without a {TOKENIZER_NAME}."
            )
            return
        settings.pop("auto_map", None)
        if not is_stock:
            # The name that every version of transformers knows, and the inputs that causal models take.
            settings["tokenizer_class"] = "PreTrainedTokenizerFast"
            settings["model_input_names"] = settings.get("model_input_names") or MiniLLMTokenizer.model_input_names
        (target / TOKENIZER_CONFIG_NAME).write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n", "utf-8")
    if (target / TOKENIZER_NAME).exists():
        compare_tokenizers(source, kind, target)


def copy_files(source: Path, target: Path) -> None:
    """Copies what carries a tokenizer and the way of generating, without code."""
    for name, file in carried_files(source).items():
        (target / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(file, target / name)
    if (target / GENERATION_CONFIG_NAME).exists():
        drop_unreal_ids(target / GENERATION_CONFIG_NAME)


def drop_unreal_ids(file: Path) -> None:
    """Takes ids below 0, with which no batch could be padded, out of a generation config."""
    settings = read_json(file)
    real = settings | {name: real_ids(settings[name]) for name in NAMED_IDS if name in settings}
    if real != settings:
        file.write_text(json.dumps(real, indent=2) + "\n", "utf-8")


def own_file(folder: Path, name: str) -> Path | None:
    """The file of a folder; None without one.

    A snapshot in the Hub's cache is a folder of links to files beside it: to these they may lead.

    Raises:
        ConversionError: it is a link that leads out of the folder, or `require_file` refuses it.
    """
    file, root = folder / name, folder.resolve()
    if root.parent.name == "snapshots":
        root = root.parents[1]
    if not exists(file):
        return None
    if not require_file(file).resolve().is_relative_to(root):
        raise ConversionError(f"{file} is a link out of its folder, to {file.resolve()}: put the file itself there")
    return file


def named_modules(folder: Path) -> Iterator[str]:
    """The modules that a tokenizer's config names."""
    if not (folder / TOKENIZER_CONFIG_NAME).exists():
        return
    classes = read_json(folder / TOKENIZER_CONFIG_NAME).get("auto_map") or []
    classes = classes.get("AutoTokenizer") or [] if isinstance(classes, dict) else classes
    for reference in [classes] if isinstance(classes, str) else classes:
        module = str(reference or "").rpartition("--")[2].partition(".")[0]
        if module.isidentifier():
            yield module


def module_files(folder: Path, module: str) -> Iterator[Path]:
    """A module of a folder and all that it imports from the same folder."""
    file = own_file(folder, f"{module}.py")
    if file is None:
        return
    yield file
    try:
        imported = get_relative_import_files(file)
    except OSError as error:
        logger.warning(f"{file} imports a module that the folder lacks: {error}")
        return
    for name in sorted({Path(path).name for path in imported}):
        if (found := own_file(folder, name)) is not None:
            yield found


def remove_tokenizer(folder: Path) -> None:
    for name in TOKENIZER_FILES:
        (folder / name).unlink(missing_ok=True)
    shutil.rmtree(folder / MORE_TEMPLATES, ignore_errors=True)


def compare_tokenizers(source: Path, kind: str | None, target: Path) -> None:
    """Refuses a written tokenizer that reads text otherwise than the source's.

    Args:
        kind: name of the source's class. Code of a folder is never run: of another class than MiniLLM's and those of
            transformers, what `tokenizer.json` says is compared, and the log says so.
    """
    if kind == MiniLLMTokenizer.__name__:
        loader = MiniLLMTokenizer
    elif kind is None or hasattr(transformers, kind):
        loader = AutoTokenizer
    else:
        loader = PreTrainedTokenizerFast
        logger.warning(
            f"The code of {source}'s tokenizer ({kind}) was left out; its {TOKENIZER_NAME} is what remains."
        )
    try:
        expected = loader.from_pretrained(source, trust_remote_code=False, local_files_only=True)
        found = AutoTokenizer.from_pretrained(target, trust_remote_code=False, local_files_only=True)
    except Exception as error:
        # Packages that are not installed, damaged files: whatever loading stumbles over.
        raise ConversionError(f"the tokenizer of {source} cannot be loaded: {error}") from error
    texts = [*PROBES, *(f"a{token}b {token}" for token in expected.get_added_vocab())]
    for what, read in {
        "vocabulary": lambda tokenizer: tokenizer.get_vocab(),
        "special tokens": lambda tokenizer: (tokenizer.special_tokens_map, set(tokenizer.all_special_ids)),
        "chat template": lambda tokenizer: tokenizer.chat_template,
        "reading of text": lambda tokenizer: [reading(tokenizer, text) for text in texts],
    }.items():
        if read(found) != read(expected):
            raise ConversionError(f"the written tokenizer has another {what} than that of {source}")


def reading(tokenizer: Any, text: str) -> dict[str, Any] | None:
    """What a tokenizer makes of a text; None where it has no token for it."""
    try:
        return dict(tokenizer(text))
    except Exception:  # The back end raises nothing more specific.
        return None
