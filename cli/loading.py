"""Loading models, tokenizers and checkpoints, with one readable error for whatever is wrong with them."""

import json
import re
from pathlib import Path
from typing import Any

from minillm.cli.console import one_line


def load_pretrained(loader: Any, name: str, what: str, **options: Any) -> Any:
    """`loader.from_pretrained(name)`.

    Args:
        loader: an Auto class of transformers.
        name: folder or repository.
        what: the thing in words, for the error.

    Raises:
        ValueError: it cannot be loaded; the message names it and the reason.
    """
    try:
        return loader.from_pretrained(name, **options)
    except Exception as error:
        # Damaged weights, wrong keys and unreachable hubs raise unrelated classes.
        if not Path(name).exists():
            message = f"{name} is no folder here and no repository that can be read: {one_line(error)}"
        else:
            message = f"{name} holds no {what} that can be loaded: {one_line(error)}"
        raise ValueError(message) from error


def last_complete_checkpoint(folder: Path) -> Path | None:
    """The Trainer's newest checkpoint that was written to its end; None without one."""
    found = [path for path in folder.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]
    for path in sorted(found, key=lambda path: -int(path.name.partition("-")[2])):
        try:
            # The Trainer writes this file last.
            json.loads((path / "trainer_state.json").read_text("utf-8"))
        except (OSError, ValueError):
            continue
        return path
    return None
