"""Tiny models, data and Trainers for the tests of training."""

import random

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments
from variants import variants

from minillm import MiniLLMConfig, MiniLLMForCausalLM
from minillm.training.callbacks import SetEpochCallback
from minillm.training.collators import DataCollatorForCausalLM, DataCollatorForPrefixLM, DataCollatorForSFT

VOCABULARY = 32
VARIANTS = variants("causal prefix alibi")


def tiny_model(variant="causal", seed=0, model_class=MiniLLMForCausalLM, **fields):
    """A model whose weights come from a generator of its own, so that they do not depend on transformers' version."""
    settings = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 48,
        "max_position_embeddings": 64,
        "pad_token_id": 0,
        **VARIANTS[variant],
        **fields,
    }
    model = model_class(MiniLLMConfig(**settings))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, parameter in sorted(model.named_parameters()):
            noise = torch.randn(parameter.shape, generator=generator) * 0.1
            parameter.copy_(1 + noise if parameter.ndim == 1 else noise)
    return model


def llama_twin(model, model_class=LlamaForCausalLM):
    """A model of Llama with the weights of a causal MiniLLM under the same names."""
    names = "vocab_size hidden_size num_hidden_layers num_attention_heads num_key_value_heads intermediate_size"
    names += " max_position_embeddings pad_token_id bos_token_id eos_token_id num_labels"
    fields = {name: getattr(model.config, name) for name in names.split()}
    twin = model_class(LlamaConfig(rms_norm_eps=model.config.norm_eps, **fields))
    twin.load_state_dict(model.state_dict(), strict=True)
    return twin


def counting_documents(count, seed=0, shortest=4, longest=24):
    """Documents to learn: each counts upwards in steps of its own, modulo the vocabulary, from a random token."""
    print(f"seed {seed}")
    rng = random.Random(seed)
    documents = []
    for _ in range(count):
        start, step = rng.randrange(1, VOCABULARY), rng.choice([1, 3])
        length = rng.randint(shortest, longest)
        documents.append({"input_ids": [1 + (start + step * at) % (VOCABULARY - 1) for at in range(length)]})
    return documents


def question_samples(count, seed=0):
    """Prompts with answers: the answer repeats the prompt's tokens in reverse order."""
    rng = random.Random(seed)
    prompts = [[rng.randrange(1, VOCABULARY) for _ in range(rng.randint(2, 6))] for _ in range(count)]
    return [{"prompt_ids": prompt, "completion_ids": prompt[::-1]} for prompt in prompts]


def collator_for(variant, **arguments):
    kind = DataCollatorForPrefixLM if variant == "prefix" else DataCollatorForCausalLM
    return kind(**{"max_length": 32, "pad_token_id": 0, **arguments})


def sft_collator(variant, **arguments):
    return DataCollatorForSFT(
        **{"max_length": 32, "pad_token_id": 0, "prompt_is_prefix": variant == "prefix", **arguments}
    )


def checkpointing(**options):
    """Arguments of the Trainer that checkpoint each layer, by the names of this transformers."""
    names = TrainingArguments.__dataclass_fields__
    name = "activation_checkpointing" if "activation_checkpointing" in names else "gradient_checkpointing"
    return {name: True, f"{name}_kwargs": options}


def enable_checkpointing(model, **options):
    """Has a model checkpoint each layer, by the method of this transformers."""
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable(options or None)


def make_trainer(model, dataset, collator, folder, eval_dataset=None, model_init=None, **arguments):
    """The stock Trainer on the CPU, which logs each step and saves nothing unless asked."""
    settings = {
        "output_dir": str(folder),
        "use_cpu": True,
        "report_to": [],
        "disable_tqdm": True,
        "save_strategy": "no",
        "logging_steps": 1,
        "per_device_train_batch_size": 8,
        "learning_rate": 1e-2,
        **arguments,
    }
    return Trainer(
        model=model,
        model_init=model_init,
        args=TrainingArguments(**settings),
        train_dataset=dataset,
        eval_dataset=eval_dataset,
        data_collator=collator,
        callbacks=[SetEpochCallback(collator)] if hasattr(collator, "set_epoch") else None,
    )


def losses(trainer):
    """The logged training losses, step by step."""
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def parameters(model):
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def largest_difference(first, second):
    """The largest absolute difference between two mappings of tensors, which must have the same names."""
    assert first.keys() == second.keys()
    return max((first[name].float() - second[name].float()).abs().max().item() for name in first)
