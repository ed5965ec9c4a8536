"""Checkpoints of other families in and out, with equal logits: `load`, `convert`, `export`."""

from minillm.conversion.convert import FAMILIES, convert, detect, export, load
from minillm.conversion.family import ConversionError, Family

__all__ = ["FAMILIES", "ConversionError", "Family", "convert", "detect", "export", "load"]
