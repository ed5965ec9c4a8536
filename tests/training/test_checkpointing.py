"""Selective checkpointing changes no gradient, and computes anew only what it does not keep."""

import collections
import pickle

import pytest
import torch
from matrix_cases import loud_model, tiny_config
from torch.utils._python_dispatch import TorchDispatchMode
from training_cases import (
    checkpointing,
    counting_documents,
    enable_checkpointing,
    losses,
    make_trainer,
    tiny_model,
)
from variants import variants

from minillm.training import DataCollatorForCausalLM, selective_checkpointing

VARIANTS = variants("causal prefix-alibi moe")


class CountedOperators(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.counts = collections.Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.counts[func.__name__.split(".")[0]] += 1
        return func(*args, **(kwargs or {}))


def run(model, ids):
    model.zero_grad()
    with CountedOperators() as counted:
        loss = model(ids, labels=ids, use_cache=False).loss
        loss.backward()
    return loss.item(), [parameter.grad.clone() for parameter in model.parameters()], counted.counts


@pytest.mark.parametrize("length", [20, 300], ids=["short", "in blocks"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_gradients_are_the_same_and_work_is_not_done_twice(variant, length):
    model = loud_model(tiny_config(max_position_embeddings=512, **VARIANTS[variant])).train()
    ids = torch.randint(19, (2, length), generator=torch.Generator().manual_seed(0))
    loss, expected, plain = run(model, ids)
    attention = "_scaled_dot_product_flash_attention_for_cpu"
    found = {}
    for name, kwargs in (
        ("all", {"use_reentrant": False}),
        ("attention", selective_checkpointing()),
        ("matmul", selective_checkpointing("matmul")),
    ):
        enable_checkpointing(model, **kwargs)
        own_loss, gradients, found[name] = run(model, ids)
        assert own_loss == loss
        for own, other in zip(gradients, expected, strict=True):
            torch.testing.assert_close(own, other)
    assert found["all"][attention] == 2 * plain[attention] > 0
    assert found["attention"][attention] == found["matmul"][attention] == plain[attention]
    assert found["attention"]["mm"] > plain["mm"]
    assert found["matmul"]["mm"] == plain["mm"]
    assert found["matmul"]["mul"] > plain["mul"]


def test_in_the_trainer(tmp_path):
    found = {}
    for keep in (None, "attention"):
        arguments = {} if keep is None else checkpointing(**selective_checkpointing(keep))
        collator = DataCollatorForCausalLM(max_length=32, pad_token_id=0)
        trainer = make_trainer(tiny_model(), counting_documents(24), collator, tmp_path, max_steps=3, **arguments)
        trainer.train()
        found[keep] = losses(trainer)
    assert found["attention"] == pytest.approx(found[None], abs=1e-5)


def test_can_be_pickled_with_the_arguments_of_a_trainer():
    again = pickle.loads(pickle.dumps(selective_checkpointing("matmul")))
    assert again["context_fn"].args[0].args == selective_checkpointing("matmul")["context_fn"].args[0].args


def test_unknown_choice():
    with pytest.raises(ValueError, match=r"`keep='all'`: choose 'attention' or 'matmul'"):
        selective_checkpointing("all")
