"""How long it takes to import MiniLLM and to load a checkpoint, beside transformers' Llama."""

import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import LlamaForCausalLM, PreTrainedModel

from benchmarks.models import Contender, Shape, build
from benchmarks.timing import Comparison, Options, Stopwatch, compare, interleave, summarise
from minillm import MiniLLMForCausalLM

IMPORTS = {"Llama": "from transformers import LlamaConfig, LlamaForCausalLM", "MiniLLM": "import minillm"}
IMPORT = "import time; start = time.{clock}()\n{statement}\nprint(time.{clock}() - start)"
CLASSES = {"Llama": LlamaForCausalLM, "MiniLLM": MiniLLMForCausalLM}
FUNCTIONS = {"wall": "perf_counter", "process": "process_time"}

SHAPES = {
    # 263 million parameters: 1.05 GB in float32.
    "full": Shape(32_000, 1024, 18, 16, 1024),
    "tiny": Shape(256, 32, 2, 2, 64),
}


def import_seconds(statement: str, clock: str) -> float:
    """Of a fresh process, from before the statement to behind it."""
    code = IMPORT.format(clock=FUNCTIONS[clock], statement=statement)
    done = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, check=True)
    return float(done.stdout)


def import_times(options: Options) -> dict[str, list[float]]:
    """Seconds of each import in fresh processes that take turns. A first pair reads the files and does not count."""
    times: dict[str, list[float]] = {name: [] for name in IMPORTS}
    for index in range(0 if options.tiny else -1, options.steps):
        for name in list(IMPORTS)[:: 1 if index % 2 else -1]:
            elapsed = import_seconds(IMPORTS[name], options.clock)
            if index >= 0:
                times[name].append(elapsed)
    return times


def write_twins(folder: Path, shape: Shape) -> int:
    """The same float32 weights as a checkpoint of MiniLLM and of Llama; returns their bytes."""
    model = build(Contender("MiniLLM causal"), shape, "cpu")
    model.save_pretrained(folder / "MiniLLM")
    twin = build(Contender("Llama"), shape, "cpu")
    twin.load_state_dict(model.state_dict())
    twin.save_pretrained(folder / "Llama")
    return sum(4 * parameter.numel() for parameter in model.parameters())


def loading(model_class: type[PreTrainedModel], folder: Path, device: str, read: bool) -> Callable[[], None]:
    """`from_pretrained`, which on CPU only maps the file into memory; with `read`, also a look at every weight."""

    def run() -> None:
        model = model_class.from_pretrained(folder, device_map=device)
        if read:
            for parameter in model.parameters():
                parameter.sum()

    return run


def measure(options: Options) -> dict[str, Any]:
    """Seconds of both, and their ratios to Llama's."""
    shape = SHAPES["tiny" if options.tiny else "full"]
    result: dict[str, Any] = {"settings": shape._asdict(), "rows": [], "comparisons": [], "not_measured": []}
    timed = [("import", import_times(options), 1.15)]
    with tempfile.TemporaryDirectory() as folder:
        size = write_twins(Path(folder), shape)
        for label, read in (("", False), (", all weights read", True)):
            runs = {name: loading(kind, Path(folder) / name, options.device, read) for name, kind in CLASSES.items()}
            times = interleave(runs, Stopwatch(options.device, options.clock), options)
            timed.append((f"from_pretrained, {size / 1e9:.2f} GB{label}", times, 1.05))
    for what, times, bound in timed:
        result["rows"] += [
            {"what": what, "contender": name, "unit": "s", **summarise(values)} for name, values in times.items()
        ]
        result["comparisons"] += compare(what, times, Comparison("MiniLLM", "Llama", at_most=bound), "time")
    return result
