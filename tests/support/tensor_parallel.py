"""What each of two processes does in test_tensor_parallel.py: load each folder cut over the ranks, and run it."""

import os
import sys
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist
import transformers.integrations.flex_attention as stock
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.attention.flex_attention import flex_attention
from transformers import AutoModelForCausalLM

from minillm.tuning import tuning


def uncompiled(query, key, value, training=False, **kwargs):
    return flex_attention(query, key, value, **kwargs)


@contextmanager
def tuned(**settings):
    before = {name: getattr(tuning, name) for name in settings}
    vars(tuning).update(settings)
    try:
        yield
    finally:
        vars(tuning).update(before)


def whole(tensor):
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def run(folder):
    model = AutoModelForCausalLM.from_pretrained(folder, tp_plan="auto")
    # Each process takes part in gathering the weights; one writes them.
    model.save_pretrained(folder / "saved", is_main_process=os.environ["RANK"] == "0")
    inputs = torch.load(folder / "inputs.pt")
    own_mask = inputs.pop("own_mask")
    cut = [name for name, weight in model.named_parameters() if isinstance(weight, DTensor)]
    found = {"cut": cut, "local": model.model.layers[0].self_attn.q_proj.weight.to_local().shape[0]}
    for back_end in ("sdpa", "eager", "flex_attention"):
        model.set_attn_implementation(back_end)
        with torch.no_grad():
            found[back_end] = whole(model(**inputs, use_cache=False).logits)
    for back_end in ("sdpa", "eager"):
        model.set_attn_implementation(back_end)
        with torch.no_grad():
            found[f"own mask, {back_end}"] = whole(model(inputs["input_ids"], own_mask, use_cache=False).logits)
    model.set_attn_implementation("sdpa")
    with torch.no_grad(), tuned(blocks_from=4):
        found["blocks"] = whole(model(**inputs, use_cache=False).logits)
    if model.config.position_embedding_type == "alibi":
        half = AutoModelForCausalLM.from_pretrained(folder, tp_plan="auto", dtype=torch.bfloat16)
        with torch.no_grad(), tuned(folding_devices=("cpu",)):
            found["folded"] = whole(half(inputs["input_ids"], use_cache=False).logits)
    sharded = AutoModelForCausalLM.from_pretrained(folder)
    for layer in sharded.model.layers:
        fully_shard(layer)
    with torch.no_grad():
        found["fsdp"] = fully_shard(sharded)(**inputs, use_cache=False).logits
    per_token = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    found["generated"] = model.generate(**per_token, max_new_tokens=6, do_sample=False, eos_token_id=-1)
    whole(model(**inputs, use_cache=False).logits).square().sum().backward()
    found["gradients"] = {name: whole(weight.grad) for name, weight in model.named_parameters()}
    return found


def refusal_of(folder):
    """What is said of heads that two processes cannot share."""
    model = AutoModelForCausalLM.from_pretrained(folder, tp_plan="auto")
    try:
        model(torch.load(folder / "inputs.pt")["input_ids"])
    except RuntimeError as error:
        return str(error)


if __name__ == "__main__":
    torch.set_num_threads(1)
    stock.compile_friendly_flex_attention = uncompiled
    root = Path(sys.argv[1])
    for folder in sorted(path for path in root.iterdir() if path.is_dir()):
        do = refusal_of if folder.name == "mqa" else run
        torch.save(do(folder), root / f"{folder.name}.{os.environ['RANK']}.pt")
    dist.destroy_process_group()
