"""Processes that end in the midst of writing a folder, and what loads from it then."""

import errno
import hashlib
import multiprocessing
import os
import signal
import sys

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from minillm import MiniLLMConfig, MiniLLMForCausalLM, MiniLLMTokenizer

SIZES = {
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}
FILE_EVENTS = {"open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.link", "os.symlink", "os.listdir"}
processes = multiprocessing.get_context("fork")


def model(seed=0, **fields):
    torch.manual_seed(seed)
    return MiniLLMForCausalLM(MiniLLMConfig(**{**SIZES, "eos_token_id": seed + 1, **fields}))


def tokenizer(text, template):
    made = MiniLLMTokenizer.train_from_iterator([text * 9], vocab_size=280, show_progress=False)
    made.chat_template = template
    return made


def llama(folder):
    LlamaForCausalLM(LlamaConfig(**SIZES)).save_pretrained(folder)
    return folder


def in_child(function, *arguments):
    """The exit code of a process that runs the function: 0, or 3 if it raised an OSError of a full disk."""

    def run():
        try:
            function(*arguments)
        except OSError as error:
            if error.errno == errno.ENOSPC:
                os._exit(3)
            raise

    child = processes.Process(target=run)
    child.start()
    child.join()
    return child.exitcode


def at_event(number, root, act):
    """From now on `act()` at each file operation below `root` after the first `number`, of this process."""
    seen = 0

    def hook(event, arguments):
        nonlocal seen
        inside = any(isinstance(one, (str, bytes, os.PathLike)) and str(root) in os.fsdecode(one) for one in arguments)
        if event in FILE_EVENTS and inside:
            seen += 1
            if seen > number:
                act()

    sys.addaudithook(hook)


def full_disk():
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


ENDINGS = {"killed": lambda: os.kill(os.getpid(), signal.SIGKILL), "full disk": full_disk}


def events_of(root, save):
    """How many file operations below `root` the function does."""
    receive, send = processes.Pipe(duplex=False)

    def run():
        count = 0

        def counted():
            nonlocal count
            count += 1

        at_event(0, root, counted)
        save()
        send.send(count)

    assert in_child(run) == 0
    return receive.recv()


def loaded(folder):
    """What loads from a folder, by content; None if nothing does."""
    try:
        found, report = MiniLLMForCausalLM.from_pretrained(folder, output_loading_info=True)
    except Exception:
        return None
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), report
    return found.config.eos_token_id, fingerprint(found)


def fingerprint(model):
    """The weights in a few characters, which pytest can print."""
    content = b"".join(tensor.numpy().tobytes() for _, tensor in sorted(model.state_dict().items()))
    return hashlib.sha256(content).hexdigest()[:12]


def loaded_tokenizer(folder):
    found = MiniLLMTokenizer.from_pretrained(folder)
    return len(found), hash(str(sorted(found.get_vocab()))), found.chat_template
