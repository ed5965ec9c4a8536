"""The checkpoints of `minillm train`: which run they belong to, and whether this one goes on from them."""

import json
import re
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

from minillm.cli.loading import check_checkpoint, last_complete_checkpoint
from minillm.cli.processes import world_size
from minillm.cli.train_command import TrainOptions
from minillm.conversion.files import read_json
from minillm.publishing.folders import require_free, write_atomically

NOTE = "options.json"
LENGTHS = ("max_steps", "epochs", "total_steps", "lengthened", "finished")
"""What may differ where a run goes on for longer."""
PINNED = {"precision": "auto", "threads": None}
"""Options that a run which goes on takes from the one that began, and the values by which it asks so."""


class Begun(NamedTuple):
    """An earlier run of the same command.

    Attributes:
        checkpoint: its last complete checkpoint; None where nothing of it can be gone on from.
        note: its options.
    """

    checkpoint: Path | None = None
    note: dict[str, Any] = {}

    @property
    def step(self) -> int:
        return 0 if self.checkpoint is None else int(self.checkpoint.name.partition("-")[2])

    @property
    def total_steps(self) -> int | None:
        """The steps that it was to make; None without it."""
        return self.note.get("total_steps", self.note.get("max_steps"))


def checkpoints_of(out: Path) -> Path:
    """The folder of the checkpoints of a model."""
    return out.with_name(f"{out.name}-checkpoints")


def note_of(options: TrainOptions, **settled: Any) -> dict[str, Any]:
    """What is noted of a run, as JSON keeps it."""
    note = {**asdict(options), "processes": world_size(), **settled}
    return json.loads(json.dumps(note, default=str))


def find_begun(checkpoints: Path, options: TrainOptions) -> Begun:
    """The run with these options that has begun to write checkpoints here.

    Raises:
        ValueError: the folder belongs to a run with other options, or to something else, or the checkpoint is damaged.
    """
    file = checkpoints / NOTE
    if not file.exists():
        require_free(checkpoints)
        return Begun()
    checkpoint = last_complete_checkpoint(checkpoints)
    if checkpoint is None:
        # Nothing is lost of a run that failed before its first checkpoint, so its options do not bind.
        return Begun()
    then, now = read_json(file), note_of(options)
    differing = [
        f"{name} was {value!r} and is {now.get(name)!r}"
        for name, value in then.items()
        if name not in LENGTHS and now.get(name) != value and not (name in PINNED and now[name] == PINNED[name])
    ]
    if differing:
        raise ValueError(
            f"{checkpoints} was begun with other options ({'; '.join(differing)}): repeat them, remove it, or choose "
            "another --out"
        )
    check_checkpoint(checkpoint)
    return Begun(checkpoint, then)


def asks_for_more(begun: Begun, options: TrainOptions) -> bool:
    """Whether a finished run is to go on: another length is asked for than it had."""
    lengths = (options.max_steps, options.epochs)
    return bool(begun.note.get("finished")) and lengths != (begun.note.get("max_steps"), begun.note.get("epochs"))


def require_no_shorter(begun: Begun, total_steps: int) -> None:
    """Refuses to go on with fewer steps than the run was to make, or has made."""
    least = begun.total_steps
    if begun.checkpoint is not None and least is not None and total_steps < least:
        raise ValueError(
            f"{begun.checkpoint.parent} was begun for {least} steps and is asked for {total_steps}: a run goes on for "
            f"as many or more; give --max-steps {least}, remove it, or choose another --out"
        )


def settle(checkpoints: Path, begun: Begun, note: dict[str, Any]) -> None:
    """Clears what is unfinished, and notes the options for the next run."""
    checkpoints.mkdir(parents=True, exist_ok=True)
    remove_unfinished(checkpoints, begun.checkpoint)
    write_atomically(checkpoints / NOTE, json.dumps(note, indent=2))


def remove_unfinished(checkpoints: Path, complete: Path | None) -> None:
    """Removes what a run left that was ended while it wrote a checkpoint: a full disk would stay full."""
    found = [*checkpoints.glob("checkpoint-*"), *checkpoints.glob(".checkpoint-*.partial")]
    newest = -1 if complete is None else int(complete.name.partition("-")[2])
    for path in found:
        number = re.fullmatch(r"\.?checkpoint-(\d+)(\.partial)?", path.name)
        if number and int(number[1]) > newest:
            shutil.rmtree(path)


def close(checkpoints: Path, note: dict[str, Any], keep: bool) -> None:
    """Notes that the run is finished; removes its checkpoints where they are not to be kept."""
    if keep:
        write_atomically(checkpoints / NOTE, json.dumps({**note, "finished": True}, indent=2))
    else:
        shutil.rmtree(checkpoints)
