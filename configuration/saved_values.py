"""What no saved config of any model holds, and what transformers would act on before it looks."""

from collections.abc import Mapping
from typing import Any

MOST_LABELS = 10_000_000

# As the families spell them: what other sizes are divided by.
DIVISORS = "num_attention_heads n_heads n_head hidden_size d_model n_embd".split()
MAPPINGS = ("id2label", "label2id", "per_layer_config", "quantization_config", "base_model_tp_plan")


def refuse_impossible(raw: Mapping[str, Any]) -> None:
    """Refuses values of a `config.json` that would fail far from where they stand, or take minutes and gigabytes.

    Raises:
        ValueError: naming the key and the value.
    """
    if not isinstance(raw.get("model_type") or "", str):
        raise ValueError(f"`model_type={raw['model_type']!r}` must be a string")
    for key in ("dtype", "torch_dtype"):
        if not is_dtype(raw.get(key)):
            raise ValueError(f"`{key}={raw[key]!r}` is no dtype of torch: write e.g. 'float32', or leave it out")
    for key in DIVISORS:
        if isinstance(raw.get(key), (int, float)) and not raw[key] > 0:
            raise ValueError(f"`{key}={raw[key]}` must be positive")
    for key in MAPPINGS:
        # Configs in memory hold objects, which are no damage.
        if isinstance(raw.get(key), (str, int, float, list)):
            raise ValueError(f"`{key}={raw[key]!r}` must be a mapping: leave it out")
    labels = raw.get("num_labels")
    if labels is not None and not (isinstance(labels, int) and 0 <= labels <= MOST_LABELS):
        raise ValueError(f"`num_labels={labels!r}` must be a number up to {MOST_LABELS:,}: leave it out")


def one_line(error: object) -> str:
    """A message without line breaks; the kind of an error that has no message."""
    return " ".join(str(error).split()) or type(error).__name__


def is_dtype(value: Any) -> bool:
    """Whether transformers can take a value for a dtype."""
    if isinstance(value, str):
        import torch

        return isinstance(getattr(torch, value, None), torch.dtype)
    # One for each part of a model, or a dtype itself.
    return not isinstance(value, (int, float, list))
