"""What a saved folder holds beside weights, how it is written and uploaded; a model's variant in words and drawings.

`describe`, `draw_mask` and `draw_positions` are imported when they are asked for: commands need the writing of folders
before they need torch.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from minillm.publishing.description import describe, draw_mask, draw_positions

__all__ = ["describe", "draw_mask", "draw_positions"]


def _find(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module("minillm.publishing.description"), name)


# A type checker that saw this function would take any name for a public one.
if not TYPE_CHECKING:
    __getattr__ = _find


def __dir__() -> list[str]:
    return sorted(__all__)
