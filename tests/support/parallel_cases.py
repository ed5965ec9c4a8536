"""What each of two processes does in test_parallel.py: train each variant on its half of every batch.

The same functions, called in one process with whole batches, give what the two must come to.
"""

import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.parallel import DistributedDataParallel
from training_cases import (
    collator_for,
    counting_documents,
    enable_checkpointing,
    losses,
    make_trainer,
    parameters,
    tiny_model,
)

from minillm.training.collators import pack_dataset

KINDS = {
    "causal": {},
    "prefix": {},
    "alibi": {},
    "tied": {"tie_word_embeddings": True},
    "without_logits": {"skip_logits": True},
    "moe": {"mlp_type": "moe", "num_local_experts": 4},
}
STEPS = 3
# Without a large eps a step has the size of the rate wherever a gradient is but noise.
ADAM = {"lr": 0.01, "eps": 1e-4}


def variant_of(kind):
    return kind if kind in ("prefix", "alibi") else "causal"


def model_for(kind):
    return tiny_model(variant_of(kind), **KINDS[kind]).train()


def batch_for(kind):
    """Eight rows with different numbers of scored tokens, packed, and how many they are in all."""
    collator = collator_for(variant_of(kind))
    batch = collator(pack_dataset(counting_documents(24, seed=4), collator)[:8])
    return batch, (batch["labels"][:, 1:] != -100).sum()


def half_of(batch, rank):
    return {name: tensor[rank::2] for name, tensor in batch.items()}


def train(model, optimizer, batch, scored, processes=1):
    """Steps on one batch. Gradients are averaged over processes, so each gives its share of a mean over all tokens."""
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss = model(**batch, num_items_in_batch=scored).loss * processes
        loss.backward()
        optimizer.step()
    return loss.detach()


def adam(weights):
    return torch.optim.AdamW(weights, **ADAM)


def trainer_for(kind, folder, per_device, **arguments):
    collator = collator_for(variant_of(kind))
    # As many as fill whole batches: accelerate fills the last one up with rows from the start.
    rows = pack_dataset(counting_documents(60), collator)[:24]
    settings = {"num_train_epochs": 2, "optim": "sgd", "learning_rate": 0.1, "per_device_train_batch_size": per_device}
    return make_trainer(model_for(kind), rows, collator, folder, **settings, **arguments)


def run(kind, folder, rank):
    batch, scored = batch_for(kind)
    half, found = half_of(batch, rank), {}

    model = model_for(kind)
    replica = DistributedDataParallel(model)
    (replica(**half, num_items_in_batch=scored).loss * 2).backward()
    found["ddp"] = {name: weight.grad for name, weight in model.named_parameters()}

    model = model_for(kind)
    optimizer = ZeroRedundancyOptimizer(model.parameters(), torch.optim.AdamW, **ADAM)
    train(DistributedDataParallel(model), optimizer, half, scored, processes=2)
    found["zero"] = parameters(model)
    found["zero_state"] = sum(state["exp_avg"].numel() for state in optimizer.optim.state.values())

    mesh = init_device_mesh("cpu", (2,))
    for name, checkpointed in (("fsdp", False), ("fsdp_checkpointed", True)):
        model = model_for(kind)
        if checkpointed:
            enable_checkpointing(model, use_reentrant=False)
        for layer in model.model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
        train(model, adam(model.parameters()), half, scored, processes=2)
        found[f"{name}_local"] = sum(weight.to_local().numel() for weight in model.parameters())
        found[name] = {name: weight.full_tensor() for name, weight in parameters(model).items()}
        whole = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
        if rank == 0:
            model.save_pretrained(folder / f"{kind}-{name}", state_dict=whole)

    trainer = trainer_for(kind, folder / "checkpoints", per_device=4, ddp_backend="gloo")
    trainer.train()
    assert isinstance(trainer.model_wrapped, DistributedDataParallel)
    found["trainer"], found["losses"] = parameters(trainer.model), losses(trainer)
    return found


if __name__ == "__main__":
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    root, rank = Path(sys.argv[1]), int(os.environ["RANK"])
    for kind in KINDS:
        torch.save(run(kind, root, rank), root / f"{kind}.{rank}.pt")
    dist.destroy_process_group()
