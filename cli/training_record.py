"""`OUT-run/`, what is left of a run of `minillm train` beside the model: settings, losses, curve, report."""

import importlib.util
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from minillm.experiments.reporting import environment, new_figure, save_picture, write_figures
from minillm.publishing.folders import require_free, write_atomically

METRICS = "metrics.jsonl"
REPORT = "report.md"
PICTURE = "curve.png"
SETTINGS = "settings.json"
OPTIONS = "options.yaml"
FILES = (METRICS, REPORT, PICTURE, SETTINGS, OPTIONS)


def record_of(out: Path) -> Path:
    """The folder of the record of a run."""
    return out.with_name(f"{out.name}-run")


def require_free_record(folder: Path) -> None:
    """Refuses to write over the record of a finished run, or over anything else; one that came to nothing may go.

    Raises:
        ValueError: something stands there.
    """
    if (folder / REPORT).exists():
        raise ValueError(f"{folder} holds the record of a finished run: move it away, or choose another --out")
    if folder.is_dir() and all(path.name in FILES for path in folder.iterdir()):
        return
    require_free(folder)


class Record:
    """The files of a run, written while it goes on.

    Args:
        folder: where they go; made if need be.
        step: where the run goes on from; lines of later steps, which are made again, are dropped.
    """

    def __init__(self, folder: Path, step: int = 0) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        if not step:
            for name in FILES:
                (folder / name).unlink(missing_ok=True)
        kept = [row for row in read_metrics(folder / METRICS) if row["step"] <= step]
        write_atomically(folder / METRICS, "".join(json.dumps(row) + "\n" for row in kept))
        self.seconds_before = max((row.get("seconds", 0.0) for row in kept), default=0.0)

    def note(self, row: Mapping[str, Any]) -> None:
        """Adds a line in one write: whatever ends the process, the file holds whole lines."""
        line = (json.dumps(row) + "\n").encode()
        file = os.open(self.folder / METRICS, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            os.write(file, line)
        finally:
            os.close(file)

    def rows(self) -> list[dict[str, Any]]:
        return read_metrics(self.folder / METRICS)

    def write_settings(
        self, options: Mapping[str, Any], plan: Mapping[str, Any], arguments: TrainingArguments, config: Any
    ) -> None:
        """All settings as JSON, and those of the command as a file that `--config` takes."""
        options = json.loads(json.dumps(options, default=str))
        settings = {
            "options": options,
            "run": plan,
            "trainer": arguments.to_sanitized_dict(),
            "config": config.to_dict(),
            "environment": environment(),
        }
        write_figures(self.folder / SETTINGS, json.loads(json.dumps(settings, default=str)))
        # By the names of the flags.
        named = {{"settings": "set"}.get(name, name): value for name, value in options.items()}
        given = {name: value for name, value in named.items() if value not in (None, {}, [])}
        write_atomically(self.folder / OPTIONS, yaml.safe_dump(given, sort_keys=False, allow_unicode=True))

    def draw(self) -> bool:
        """Draws the curve; False where matplotlib is missing, or nothing was noted."""
        rows = self.rows()
        if not rows or importlib.util.find_spec("matplotlib") is None:
            return False
        figure, ((axes,),) = new_figure(size=(7, 4))
        for key, words in (("loss", "training"), ("eval_loss", "held out")):
            points = [(row["step"], row[key]) for row in rows if key in row]
            if points:
                axes.plot(*zip(*points, strict=True), marker="o" if len(points) < 20 else None, ms=3, label=words)
        axes.set(xlabel="step", ylabel="loss (nats per token)")
        axes.grid(alpha=0.3)
        axes.legend()
        save_picture(self.folder / PICTURE, figure)
        return True


def read_metrics(file: Path) -> list[dict[str, Any]]:
    """The lines of a file of metrics; a last one that is not whole is passed over."""
    if not file.exists():
        return []
    found = []
    for line in file.read_text("utf-8").splitlines():
        try:
            found.append(json.loads(line))
        except ValueError:
            continue
    return found


class RecordCallback(TrainerCallback):
    """Notes what the Trainer logs, as it logs it.

    Args:
        record: where to.
        clock: seconds that this process has trained.
        tokens_per_step: of all processes.
    """

    def __init__(self, record: Record, clock: Any, tokens_per_step: float) -> None:
        self.record, self.clock, self.tokens_per_step = record, clock, tokens_per_step

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        logs = logs or {}
        if "loss" not in logs and "eval_loss" not in logs:
            return
        kept = {key: value for key, value in logs.items() if isinstance(value, (int, float))}
        self.record.note(
            {
                "step": state.global_step,
                **kept,
                "tokens": round(state.global_step * self.tokens_per_step),
                "seconds": round(self.record.seconds_before + self.clock(), 3),
            }
        )
