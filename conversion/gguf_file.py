"""GGUF files of LLaMAs, read by transformers, whose reader passes over what it does not know: that is refused here."""

import json
import math
import re
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    GgufConfig,
    PreTrainedTokenizerFast,
)

from minillm.conversion.family import ConversionError
from minillm.conversion.files import kind_of, require_held
from minillm.conversion.gguf_header import check_header

# Without the number of key heads transformers leaves queries and keys in GGUF's order; for others it has defaults.
REQUIRED = frozenset(
    f"llama.{key}"
    for key in "block_count context_length embedding_length feed_forward_length attention.head_count "
    "attention.head_count_kv attention.layer_norm_rms_epsilon".split()
)
READ = REQUIRED | {"llama.rope.freq_base", "llama.rope.dimension_count", "llama.vocab_size"}
TOKENS = "tokenizer.ggml.tokens"
SPECIAL_TOKEN = re.compile(r"tokenizer\.ggml\.(bos|eos|padding|unknown)_token_id")
TENSOR = re.compile(
    r"(token_embd|output_norm|output|blk\.\d+\.(attn_(q|k|v|output|norm)|ffn_(gate|up|down|norm)))\.weight"
)


class GGUFCheckpoint:
    """A GGUF file as a checkpoint, all of it in memory in float32, whatever its quantization.

    Settings and tensors that transformers' reader passes over stand in `config` under their GGUF names, so that they
    are refused, or ignored, like any other key.

    Raises:
        ConversionError: the file is damaged, or no LLaMA's, or the package `gguf` is not installed.
    """

    def __init__(self, file: Path) -> None:
        self.folder, self.file = file.parent, file
        try:
            reader = open_header(file)
            passed_over = unread(file, reader)
            native = AutoConfig.from_pretrained(file.parent, gguf_file=file.name)
            require_held(file, native, {tensor.name: tensor.shape.tolist() for tensor in reader.tensors})
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                file.parent,
                gguf_file=file.name,
                dtype=torch.float32,
                quantization_config=GgufConfig(dequantize=True),
                output_loading_info=True,
            )
            model, info = loaded
            self.tokenizer = read_tokenizer(file, reader, model.config.vocab_size)
        except ConversionError:
            raise
        except Exception as error:
            # Damaged files raise whatever the reader stumbles over.
            raise ConversionError(f"{file} cannot be read: {error}") from error
        if made_up := sorted(info["missing_keys"]):
            raise ConversionError(f"{file} lacks {', '.join(f'`{name}`' for name in made_up[:3])}")
        self.config = {**model.config.to_dict(), **passed_over}
        # The second is the model's title in the file.
        for key in ("quantization_config", "_model_name_or_path"):
            self.config.pop(key, None)
        self.generation_config: GenerationConfig = model.generation_config
        self.model, self.tensors = model, model.state_dict()
        if model.config.tie_word_embeddings:
            del self.tensors["lm_head.weight"]
        self.shapes = {name: list(tensor.shape) for name, tensor in self.tensors.items()}
        self.kinds = {name: kind_of(tensor) for name, tensor in self.tensors.items()}
        self.names = self.tensors.keys()
        self.where = dict.fromkeys(self.names, file)

    def tensor(self, name: str) -> torch.Tensor:
        return self.tensors[name]

    def check_carried(self) -> None:
        """Nothing: the tokenizer is read already."""

    def carry_over(self, target: Path) -> None:
        """Writes tokenizer and generation config."""
        self.tokenizer.save_pretrained(target)
        self.generation_config.save_pretrained(target)


def open_header(file: Path) -> Any:
    """The `GGUFReader` of a file. ConversionError where it is damaged, or the package is not installed."""
    try:
        from gguf import GGUFReader
    except ImportError as error:
        raise ConversionError(f"{file}: what reads GGUF files is the package gguf: pip install gguf") from error
    check_header(file)
    return GGUFReader(file)


def unread(file: Path, reader: Any) -> dict[str, Any]:
    """Settings, and tensors with their shapes, that change a LLaMA and that transformers does not read.

    Raises:
        ConversionError: another architecture, or a setting without which transformers misreads.
    """
    architecture = reader.fields["general.architecture"].contents()
    if architecture != "llama":
        raise ConversionError(f"{file} holds a {architecture!r}; of GGUF files only a 'llama' can be converted")
    settings = {key: field.contents() for key, field in reader.fields.items() if key.startswith(("llama.", "split."))}
    if missing := sorted(REQUIRED - settings.keys()):
        raise ConversionError(f"{file} lacks {', '.join(f'`{key}`' for key in missing)}")
    for key in sorted(READ & settings.keys()):
        if not isinstance(settings[key], int | float) or not 0 < settings[key] < math.inf:
            raise ConversionError(f"{file}: `{key}={settings[key]!r}` must be a positive number")
    check_special_tokens(file, reader)
    if settings["llama.block_count"] > len(reader.tensors):
        raise ConversionError(
            f"{file}: `llama.block_count={settings['llama.block_count']}` cannot be with {len(reader.tensors)} tensors"
        )
    tensors = {tensor.name: tensor.shape.tolist() for tensor in reader.tensors if not TENSOR.fullmatch(tensor.name)}
    return {key: value for key, value in settings.items() if key not in READ and not harmless(key, settings)} | tensors


def check_special_tokens(file: Path, reader: Any) -> None:
    """Refuses ids of special tokens that the file's vocabulary lacks. ConversionError names the first."""
    if (tokens := reader.fields.get(TOKENS)) is None:
        raise ConversionError(f"{file} lacks `{TOKENS}`")
    count = len(tokens.data)
    for key, field in reader.fields.items():
        if SPECIAL_TOKEN.fullmatch(key) and field.contents() not in range(count):
            raise ConversionError(f"{file}: `{key}={field.contents()!r}` is none of its {count:,} tokens")


def harmless(key: str, settings: dict[str, Any]) -> bool:
    """Whether a setting that transformers does not read says what it takes for granted."""
    head_dim = settings.get("llama.rope.dimension_count")
    if head_dim is None:
        head_dim = settings["llama.embedding_length"] // settings["llama.attention.head_count"]
    granted = {
        "llama.attention.key_length": head_dim,
        "llama.attention.value_length": head_dim,
        "llama.rope.scaling.type": "none",
        "llama.expert_count": 0,
        "llama.expert_used_count": 0,
    }
    return key in granted and settings[key] == granted[key]


def read_tokenizer(file: Path, reader: Any, vocab_size: int) -> PreTrainedTokenizerFast:
    """The tokenizer of a file as transformers reads it, with the special tokens that the file names.

    Of these some versions of transformers take the end from the beginning, leave out the padding, or add tokens of
    their own, for which a model of `vocab_size` has no row.
    """
    found = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    state = json.loads(found.backend_tokenizer.to_str())
    state["added_tokens"] = [token for token in state["added_tokens"] if token["id"] < vocab_size]
    fields = {key.removeprefix("tokenizer.ggml."): field for key, field in reader.fields.items()}
    names = {"bos_token": "bos", "eos_token": "eos", "pad_token": "padding", "unk_token": "unknown"}
    special = {
        name: fields["tokens"].contents(fields[f"{key}_token_id"].contents())
        for name, key in names.items()
        if f"{key}_token_id" in fields
    }
    # As llama.cpp has it, SentencePiece's vocabularies begin texts unless they say otherwise.
    adds = {"add_bos_token": fields["model"].contents() == "llama", "add_eos_token": False}
    adds |= {name: fields[name].contents() for name in adds if name in fields}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(state)), chat_template=found.chat_template, **special, **adds
    )
