"""What a preset is, and the table of all."""

from typing import Any, NamedTuple


class Preset(NamedTuple):
    """One named architecture: a sentence on it, the source of its numbers, the config fields that differ from the
    defaults, and the family it belongs to."""

    description: str
    source: str
    fields: dict[str, Any]
    family: str = "minillm"


PRESETS: dict[str, Preset] = {}
"""All presets by name, entered by `minillm.configuration.presets`; the copy of this code beside a saved model has
none."""


def size(hidden_size: int, num_hidden_layers: int, num_attention_heads: int) -> dict[str, int]:
    """The three numbers by which the sizes of most families differ."""
    return {
        "hidden_size": hidden_size,
        "num_hidden_layers": num_hidden_layers,
        "num_attention_heads": num_attention_heads,
    }
