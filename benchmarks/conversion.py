"""Speed and memory of `minillm.conversion.convert` on a checkpoint of LLaMA-7B's shape.

    python -m benchmarks.conversion [--layers 32] [--folder DIR] [--json results.json]

Writes a bfloat16 checkpoint of made-up weights (13.5 GB at 32 layers; twice that is needed on the disk), converts it
in a process of its own, compares some tensors bit for bit and deletes all files again. The peak of that process should
be near one output shard and one layer, however large the checkpoint is. The files were just written, so that some of
them are read from the system's cache, not from the disk.
"""

import argparse
import json
import math
import shutil
import subprocess
import sys
import tempfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import safe_open
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.timing import Options, summarise

GB = 10**9
LLAMA_7B = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_attention_heads": 32,
    "max_position_embeddings": 2048,
}
# Not a divisor of any size here, so that no two rows of a tensor are the same.
PERIOD = 1_000_003
CONVERSION = """
import json, os, resource, sys, time
from minillm.conversion import comparison, convert

# Measured is the writing, not the comparison of logits after it.
comparison.SHARE_OF_MEMORY = 0

def peak():
    # What getrusage tells is at least the peak of the parent process; Linux has this process's own as well.
    if os.path.exists("/proc/self/status"):
        return 1024 * next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))
    # In kilobytes, but for macOS.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)

before, start = peak(), time.perf_counter()
convert("native", "ours", max_shard_size=sys.argv[1])
print(json.dumps({"seconds": time.perf_counter() - start, "peak_before": before, "peak": peak()}))
"""


def made_up(name: str, shape: list[int]) -> torch.Tensor:
    """The bfloat16 tensor of a name, the same each time."""
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    count = math.prod(shape)
    drawn = torch.randn(min(count, PERIOD), generator=generator).mul_(0.02).to(torch.bfloat16)
    return drawn.repeat(-(-count // len(drawn)))[:count].view(shape)


def as_bytes(tensor: torch.Tensor) -> memoryview:
    return memoryview(tensor.contiguous().view(torch.uint8).numpy())


def write_shard(file: Path, shapes: dict[str, list[int]]) -> None:
    """A safetensors file of made-up tensors, of which no more than one is in memory."""
    header, end = {}, 0
    for name, shape in shapes.items():
        start, end = end, end + 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    with file.open("wb") as out:
        out.write(len(text).to_bytes(8, "little") + text)
        for name, shape in shapes.items():
            out.write(as_bytes(made_up(name, shape)))


def write_checkpoint(folder: Path, config: LlamaConfig, max_shard_size: str) -> dict[str, list[int]]:
    """A LLaMA's folder; returns the shapes of its tensors."""
    folder.mkdir()
    config.save_pretrained(folder)
    with torch.device("meta"):
        tensors = LlamaForCausalLM(config).to(torch.bfloat16).state_dict()
    shapes = {name: list(tensor.shape) for name, tensor in tensors.items()}
    plan = split_torch_state_dict_into_shards(
        tensors, filename_pattern="model{suffix}.safetensors", max_shard_size=max_shard_size
    )
    for file, names in plan.filename_to_tensors.items():
        write_shard(folder / file, {name: shapes[name] for name in names})
    if plan.is_sharded:
        index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index), "utf-8")
    return shapes


def weight_files(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


def differing(folder: Path, shapes: dict[str, list[int]]) -> Iterator[str]:
    """Which of some tensors are not, bit for bit, those that were made up. LLaMA's names are MiniLLM's."""
    deep = max(name for name in shapes if name.endswith("mlp.down_proj.weight"))
    chosen = {"model.embed_tokens.weight", "model.layers.0.self_attn.q_proj.weight", deep, "lm_head.weight"}
    for file in weight_files(folder):
        with safe_open(file, "pt") as opened:
            for name in chosen & set(opened.keys()):
                chosen.remove(name)
                if as_bytes(opened.get_tensor(name)) != as_bytes(made_up(name, shapes[name])):
                    yield name
    yield from chosen


def measure(folder: Path, config: LlamaConfig, input_shard: str, output_shard: str) -> dict[str, float]:
    """Writes, converts and compares in `folder`; sizes in bytes.

    Raises:
        ValueError: a converted tensor is not what it should be.
    """
    shapes = write_checkpoint(folder / "native", config, input_shard)
    command = [sys.executable, "-c", CONVERSION, output_shard]
    told = subprocess.run(command, cwd=folder, stdout=subprocess.PIPE, text=True, check=True).stdout
    if wrong := sorted(differing(folder / "ours", shapes)):
        raise ValueError(f"converted otherwise: {', '.join(wrong)}")
    sizes = {kind: [file.stat().st_size for file in weight_files(folder / kind)] for kind in ("native", "ours")}
    figures = json.loads(told.splitlines()[-1])
    return {
        **figures,
        "bytes": sum(sizes["native"]),
        "bytes_per_second": sum(sizes["native"]) / figures["seconds"],
        "largest_input_shard": max(sizes["native"]),
        "largest_output_shard": max(sizes["ours"]),
        "layer": 2 * sum(math.prod(shape) for name, shape in shapes.items() if ".layers.0." in name),
    }


def shape_of(layers: int, hidden_size: int = LLAMA_7B["hidden_size"]) -> dict[str, int]:
    """LLaMA-7B's, with so many layers; in another width also with a small vocabulary."""
    shape = LLAMA_7B | {"hidden_size": hidden_size, "num_hidden_layers": layers}
    if hidden_size != LLAMA_7B["hidden_size"]:
        shape |= {"intermediate_size": 2 * hidden_size, "vocab_size": 1024}
    return shape


def measure_in_rounds(options: Options) -> dict[str, Any]:
    """Seconds and peak of a few layers of LLaMA-7B, converted up to three times."""
    layers, width = (2, 256) if options.tiny else (4, LLAMA_7B["hidden_size"])
    shards = ("1MB", "300KB") if options.tiny else ("1GB", "500MB")
    figures = []
    for _ in range(min(3, options.steps)):
        with tempfile.TemporaryDirectory() as folder:
            figures.append(measure(Path(folder), LlamaConfig(**shape_of(layers, width)), *shards))
    what = f"convert, {figures[0]['bytes'] / GB:.2f} GB in shards of {shards[0]}, written in shards of {shards[1]}"
    rows = [
        {
            "what": f"{what}: {label}",
            "contender": "MiniLLM",
            "unit": unit,
            **summarise([told[key] for told in figures]),
        }
        for label, key, unit in (
            ("time", "seconds", "s"),
            ("peak memory", "peak", "B"),
            ("before", "peak_before", "B"),
        )
    ]
    return {"settings": shape_of(layers, width), "rows": rows, "comparisons": [], "not_measured": []}


def main(arguments: list[str] | None = None) -> dict[str, float]:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.conversion", description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--hidden-size", type=int, default=LLAMA_7B["hidden_size"])
    parser.add_argument("--input-shard", default="5GB", help="largest weight file of the checkpoint")
    parser.add_argument("--output-shard", default="2GB", help="largest weight file to write")
    parser.add_argument("--folder", type=Path, help="where to write; left out: the system's temporary folder")
    parser.add_argument("--json", type=Path, help="file for the figures, in bytes and seconds")
    options = parser.parse_args(arguments)
    shape = shape_of(options.layers, options.hidden_size)
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        free, needed = shutil.disk_usage(folder).free, 5 * parameters(shape)
        if free < needed:
            parser.error(f"{folder} has {free / GB:.1f} GB free; {needed / GB:.1f} GB are needed")
        figures = measure(Path(folder), LlamaConfig(**shape), options.input_shard, options.output_shard)
    speed = f"{figures['bytes'] / GB:.2f} GB in {figures['seconds']:.1f} s"
    print(f"| converted | {speed}, {figures['bytes_per_second'] / GB:.2f} GB/s |\n|---|---|")
    for name in ("peak", "peak_before", "largest_output_shard", "layer", "largest_input_shard"):
        print(f"| {name.replace('_', ' ')} | {figures[name] / GB:.2f} GB |")
    if options.json:
        options.json.write_text(json.dumps(figures, indent=2) + "\n", "utf-8")
    return figures


def parameters(shape: dict[str, int]) -> int:
    with torch.device("meta"):
        return LlamaForCausalLM(LlamaConfig(**shape)).num_parameters()


if __name__ == "__main__":
    main()
