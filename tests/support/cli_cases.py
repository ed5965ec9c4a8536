"""The `minillm` command inside the test process, on tiny models and made-up Python sources."""

import json
import random

import torch
from peft import (
    LoraConfig,
    get_peft_model,
)
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner
from variants import variants

from minillm import MiniLLMConfig, MiniLLMForCausalLM, MiniLLMTokenizer
from minillm.cli.main import app

VARIANTS = variants("causal prefix alibi bidirectional")
WORDS = "the reader returns value of each file line and writes number to name while list holds more than one".split()
MIXED_TEXT = "Peking (北京) is the capital of China; 你好，世界！ It has 21 million inhabitants.\n"


def invoke(*arguments, stdin=None):
    return CliRunner().invoke(app, [str(argument) for argument in arguments], input=stdin)


def succeed(*arguments, stdin=None):
    """What the command prints on the standard output; it must end well and say nothing on the other one."""
    result = invoke(*arguments, stdin=stdin)
    assert result.exit_code == 0, (result.output, result.exception)
    assert result.stderr == ""
    return result.stdout


def fail(*arguments, stdin=None):
    """The one line of error that the command must end with."""
    result = invoke(*arguments, stdin=stdin)
    assert isinstance(result.exception, SystemExit), repr(result.exception)
    assert result.exit_code == 1, result.output
    lines = result.stderr.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), result.stderr
    return lines[0]


def tree(folder):
    """The files and folders below a folder, hidden ones included."""
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


def sentence(rng, words):
    return " ".join(rng.choice(WORDS) for _ in range(words))


def python_source(seed, functions=6):
    """A module with docstrings of more than 80 characters, made of a few words."""
    rng = random.Random(seed)
    parts = [f'"""{sentence(rng, 24)}."""\n']
    for number in range(functions):
        name, argument = rng.choice(WORDS), rng.choice(WORDS)
        parts.append(
            f'def {name}_{number}({argument}):\n    """{sentence(rng, 20)}."""\n    if {argument} > {number}:\n'
            f"        return {argument} + {rng.randrange(100)}\n    return [{argument}, {number}]\n"
        )
    return "\n\n".join(parts)


def write_corpus(folder, files=30):
    folder.mkdir(parents=True)
    for number in range(files):
        (folder / f"module_{number}.py").write_text(python_source(number), "utf-8")
    return folder


def answer_lines(form, count):
    """Questions with answers as prompts and completions, or as messages."""
    for number in range(count):
        question, answer = f"{number} plus 1 is", f" {number + 1}.\u2028"
        if form == "prompts":
            yield {"prompt": question, "completion": answer}
        else:
            turns = [("user", question), ("assistant", answer)]
            yield {"messages": [{"role": role, "content": content} for role, content in turns]}


def write_answers(path, form, count=40):
    # Unescaped, so that a line separator of Unicode stands in the file as it is.
    lines = [json.dumps(record, ensure_ascii=False) + "\n" for record in answer_lines(form, count)]
    path.write_text("".join(lines), "utf-8")
    return path


def small_tokenizer(vocab_size=320):
    texts = [python_source(number) for number in range(10)] + [MIXED_TEXT]
    return MiniLLMTokenizer.train_from_iterator(texts, vocab_size=vocab_size, show_progress=False)


def small_model(tokenizer, variant="causal", seed=0, **fields):
    """A model with weights so large that greedy text is not one token over and over."""
    torch.manual_seed(seed)
    settings = {
        "vocab_size": len(tokenizer),
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 64,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        **VARIANTS[variant],
        **fields,
    }
    model = MiniLLMForCausalLM(MiniLLMConfig(**settings))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.2)
    return model.eval()


def save_small_model(folder, variant="causal", **fields):
    """Saves a model with its tokenizer, as all commands that load a model expect it."""
    tokenizer = small_tokenizer()
    small_model(tokenizer, variant, **fields).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def weights(model):
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def assert_same_weights(one, other):
    assert one.keys() == other.keys()
    different = [name for name in one if not torch.equal(one[name], other[name])]
    assert not different


def save_adapter(base, folder):
    adapted = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base), LoraConfig(r=2, task_type="CAUSAL_LM", init_lora_weights=False)
    )
    adapted.save_pretrained(folder)
    small_tokenizer().save_pretrained(folder)
    return folder
