"""What a model is: pure data and its validation, without torch modules."""

from minillm.configuration.presets import PRESETS

__all__ = ["PRESETS"]
