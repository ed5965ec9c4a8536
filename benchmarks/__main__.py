"""Speed of MiniLLM's variants against transformers' own models, side by side in one run.

    python -m benchmarks [--steps 10] [--json results.json]

Each round times every contender once, in turn, so that a drift of the machine's speed meets all of them; the figures
are medians over rounds and ratios, within a round, of a contender to transformers' model of its kind: Mixtral for a
mixture of experts, else Llama. On CUDA the shapes are larger and the model runs in bfloat16.
"""

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable

import torch
import transformers
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
)

import minillm
from minillm import MiniLLMConfig, MiniLLMForCausalLM

SHAPES = {
    "cpu": {"vocab": 2048, "hidden": 256, "layers": 4, "heads": 8, "batch": 4, "length": 256, "new": 48},
    "cuda": {"vocab": 32000, "hidden": 2048, "layers": 16, "heads": 16, "batch": 8, "length": 2048, "new": 128},
}

BASELINES = {"Mixtral": "Mixtral", "MiniLLM moe": "Mixtral"}


def contenders(shape: dict[str, int]) -> dict[str, Callable[[], PreTrainedModel]]:
    """Names and constructors of the models, all of one shape."""
    inner = -(-8 * shape["hidden"] // (3 * 256)) * 256
    common = {
        "vocab_size": shape["vocab"],
        "hidden_size": shape["hidden"],
        "num_hidden_layers": shape["layers"],
        "num_attention_heads": shape["heads"],
        "intermediate_size": inner,
        "max_position_embeddings": 2 * shape["length"],
    }
    bloom = BloomConfig(
        vocab_size=shape["vocab"], hidden_size=shape["hidden"], n_layer=shape["layers"], n_head=shape["heads"]
    )
    # A quarter of the width: with two experts a token half of the arithmetic of a dense layer, and twice its weights.
    experts = {**common, "intermediate_size": inner // 4, "num_local_experts": 8, "num_experts_per_tok": 2}
    experts["num_key_value_heads"] = shape["heads"]
    return {
        "Llama": lambda: LlamaForCausalLM(LlamaConfig(**common)),
        "Bloom": lambda: BloomForCausalLM(bloom),
        "MiniLLM causal": lambda: MiniLLMForCausalLM(MiniLLMConfig(**common)),
        "MiniLLM prefix": lambda: MiniLLMForCausalLM(MiniLLMConfig(**common, attention_type="prefix")),
        "MiniLLM alibi": lambda: MiniLLMForCausalLM(MiniLLMConfig(**common, position_embedding_type="alibi")),
        "Mixtral": lambda: MixtralForCausalLM(MixtralConfig(**experts)),
        "MiniLLM moe": lambda: MiniLLMForCausalLM(MiniLLMConfig(**experts, mlp_type="moe")),
    }


def seconds(run: Callable[[], object], device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def training_step(model: PreTrainedModel, inputs: dict[str, torch.Tensor]) -> Callable[[], object]:
    def run() -> None:
        model.train()
        model.zero_grad()
        model(**inputs, labels=inputs["input_ids"], use_cache=False).loss.backward()

    return run


def decoding(model: PreTrainedModel, prompt: torch.Tensor, new: int) -> Callable[[], object]:
    def run() -> None:
        model.eval()
        model.generate(prompt, max_new_tokens=new, min_new_tokens=new, do_sample=False, pad_token_id=0)

    return run


def measure(shape: dict[str, int], device: str, steps: int) -> dict[str, dict[str, list[float]]]:
    """Seconds of each contender in each round: {"training" | "decoding": {name: [seconds, ...]}}."""
    torch.manual_seed(0)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    ids = torch.randint(3, shape["vocab"], (shape["batch"], shape["length"]), device=device)
    prefix = torch.zeros_like(ids)
    prefix[:, : shape["length"] // 2] = 1
    times: dict[str, dict[str, list[float]]] = {"training": {}, "decoding": {}}
    runs: dict[tuple[str, str], Callable[[], object]] = {}
    for name, make in contenders(shape).items():
        model = make().to(device, dtype)
        inputs = {"input_ids": ids} | ({"prefix_mask": prefix} if "prefix" in name else {})
        # Experts are trained with the loss that balances them.
        inputs |= {"output_router_logits": True} if BASELINES.get(name) == "Mixtral" else {}
        runs["training", name] = training_step(model, inputs)
        runs["decoding", name] = decoding(model, ids[:1, : shape["length"] // 4], shape["new"])
    for round_index in range(steps + 1):
        for (kind, name), run in runs.items():
            elapsed = seconds(run, device)
            if round_index > 0:
                times[kind].setdefault(name, []).append(elapsed)
    return times


def summarise(times: dict[str, dict[str, list[float]]], shape: dict[str, int]) -> list[dict[str, object]]:
    """One row per kind and contender: median seconds, tokens per second, ratio of speed to its baseline's (median,
    range)."""
    rows = []
    for kind, by_name in times.items():
        tokens = shape["batch"] * shape["length"] if kind == "training" else shape["new"]
        for name, values in by_name.items():
            baseline = BASELINES.get(name, "Llama")
            ratios = sorted(stock / own for stock, own in zip(by_name[baseline], values, strict=True))
            median = statistics.median(values)
            rows.append(
                {
                    "kind": kind,
                    "model": name,
                    "seconds": median,
                    "tokens_per_second": tokens / median,
                    "baseline": baseline,
                    "speed_vs_baseline": statistics.median(ratios),
                    "range": [ratios[0], ratios[-1]],
                }
            )
    return rows


def main(arguments: list[str] | None = None) -> list[dict[str, object]]:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=10, help="timed rounds after one warm-up round")
    parser.add_argument("--json", help="file for the rows and the facts of the environment")
    parser.add_argument("--length", type=int, help="tokens per row in place of the default")
    options = parser.parse_args(arguments)
    if options.steps < 1:
        parser.error(f"--steps {options.steps}: at least 1")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    shape = SHAPES[device] | ({"length": options.length} if options.length else {})
    facts = {
        "minillm": minillm.__version__,
        "transformers": transformers.__version__,
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name() if device == "cuda" else platform.machine(),
        "threads": torch.get_num_threads(),
        "shape": shape,
        "rounds": options.steps,
    }
    rows = summarise(measure(shape, device, options.steps), shape)
    print(f"| | {'model':15} | tokens/s | speed against transformers' model (range) |\n|---|---|---|---|")
    for row in rows:
        low, high = row["range"]
        ratio = f"{row['speed_vs_baseline']:.2f} of {row['baseline']} ({low:.2f}-{high:.2f})"
        print(f"| {row['kind']} | {row['model']:15} | {row['tokens_per_second']:,.0f} | {ratio} |")
    if options.json:
        with open(options.json, "w", encoding="utf-8") as file:
            json.dump({"environment": facts, "rows": rows}, file, indent=2)
    return rows


if __name__ == "__main__":
    main()
