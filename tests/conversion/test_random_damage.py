"""Checkpoints that are damaged at random: one line that names the file or the field and leaves nothing, or the same
model that transformers reads.
"""

import functools
import json
import shutil
import signal
import tempfile
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from conversion_cases import logits_of, save_native
from hypothesis import strategies as st
from random_cases import random_test
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from minillm import MiniLLMForCausalLM
from minillm.conversion import convert, load

FORMS = ("whole", "shards", "bin")
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab2935c943f9e0ff69d22eadbb8f32b1\nsize 9\n"
HTML = b"<!DOCTYPE html><html><head><title>Not found</title></head><body>404</body></html>"


pytestmark = pytest.mark.usefixtures("without_bars")


@functools.cache
def kept(form):
    """A checkpoint that is whole, and the folder's life."""
    holder = tempfile.TemporaryDirectory()
    folder = Path(holder.name)
    native = save_native(folder, max_shard_size="20KB" if form == "shards" else "1GB")
    if form == "bin":
        torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
        (folder / "model.safetensors").unlink()
    return holder, folder, logits_of(native)


# --- damages: each a function of a folder ---

VALUES = st.sampled_from(
    [None, True, -1, 0, 1, 3, 7, 10**9, 10**30, 0.5, -0.5, 1e308, float("nan"), "", "x", "os.system", "int8", [], [1]]
) | st.sampled_from([{}, {"x": 1}, [[]], "llama", "gelu", "float16", "../x", 16, 48])


def in_bytes(change):
    @st.composite
    def damage(draw):
        place, other = draw(st.floats(0, 1, exclude_max=True)), draw(st.integers(1, 255))
        number = draw(st.integers(0, 9))

        def act(folder):
            files = sorted(path for path in folder.iterdir() if path.name != "generation_config.json")
            file = files[number % len(files)]
            content = file.read_bytes()
            file.write_bytes(change(content, int(place * len(content)), other))

        return change.__name__, act

    return damage()


def cut_off(content, place, other):
    return content[:place]


def with_another_byte(content, place, other):
    return content[:place] + bytes([content[place] ^ other]) + content[place + 1 :]


def with_more_bytes(content, place, other):
    return content[:place] + bytes([other]) * 8 + content[place:]


def replaced(content, place, other):
    return (LFS, HTML, b"", b"{}", b"[]", b"null")[other % 6]


@st.composite
def in_json(draw, name):
    """One entry of a JSON file, at any depth, is another or is missing."""
    number, value, missing = draw(st.integers(0, 99)), draw(VALUES), draw(st.integers(0, 3)) == 0

    def act(folder):
        path = folder / name
        if not path.exists():
            return
        content = json.loads(path.read_text("utf-8"))
        places = [(content, key) for key in sorted(content)]
        for _, key in list(places):
            if isinstance(content[key], dict):
                places += [(content[key], inner) for inner in sorted(content[key])]
        holder, key = places[number % len(places)]
        if missing:
            del holder[key]
        else:
            holder[key] = value
        path.write_text(json.dumps(content), "utf-8")

    return f"{name}, entry {number}: {'missing' if missing else repr(value)}", act


TENSORS = {
    "int8": lambda tensor: tensor.to(torch.int8),
    "complex": lambda tensor: tensor.to(torch.complex64),
    "half": lambda tensor: tensor.half(),
    "nan": lambda tensor: tensor * torch.nan,
    "turned": lambda tensor: tensor.T.contiguous(),
    "longer": lambda tensor: torch.cat([tensor, tensor]),
    "empty": lambda tensor: tensor[:0],
}


@st.composite
def in_tensors(draw):
    """One tensor is another, missing, or goes by another name."""
    number, change = draw(st.integers(0, 99)), draw(st.sampled_from([*TENSORS, "missing", "renamed", "no tensor"]))

    def act(folder):
        files = sorted(path for path in folder.iterdir() if path.suffix in (".safetensors", ".bin"))
        file = files[number % len(files)]
        is_bin = file.suffix == ".bin"
        tensors = torch.load(file) if is_bin else load_file(file)
        name = sorted(tensors)[number % len(tensors)]
        if change in TENSORS:
            tensors[name] = TENSORS[change](tensors[name])
        elif change == "missing":
            del tensors[name]
        elif change == "renamed":
            tensors[f"{name}.x"] = tensors.pop(name)
        elif is_bin:
            tensors[name] = "text"
        torch.save(tensors, file) if is_bin else save_file(tensors, file, {"format": "pt"})

    return f"tensor {number}: {change}", act


DAMAGES = st.one_of(
    *(in_bytes(change) for change in (cut_off, with_another_byte, with_more_bytes, replaced)),
    in_json("config.json"),
    in_json("config.json"),
    in_json("model.safetensors.index.json"),
    in_tensors(),
)


@contextmanager
def seconds(limit):
    def late(*arguments):
        raise AssertionError(f"not done within {limit} seconds")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(limit)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@random_test(quick=6, full=1500, form=st.sampled_from(FORMS), damage=DAMAGES, only_load=st.booleans())
def test_a_damaged_checkpoint_is_refused_by_name_or_read_as_it_is(form, damage, only_load):
    _, act = damage
    with tempfile.TemporaryDirectory() as root:
        source, out = Path(root) / "source", Path(root) / "ours"
        shutil.copytree(kept(form)[1], source)
        act(source)
        try:
            with seconds(30):
                model = load(source) if only_load else None
                if not only_load:
                    convert(source, out)
        except (ValueError, OSError) as error:
            assert "\n" not in str(error), error
            named = [path.name for path in source.iterdir()] + ["`", "config.json", str(source)]
            assert any(name in str(error) for name in named), error
            assert [path.name for path in Path(root).iterdir()] == ["source"]
            return
        found = logits_of(model if only_load else MiniLLMForCausalLM.from_pretrained(out))
        # Transformers reads it too, or what is damaged says nothing of the model.
        try:
            with seconds(60):
                expected = logits_of(AutoModelForCausalLM.from_pretrained(source))
        except Exception:
            expected = kept(form)[2]
        torch.testing.assert_close(found.float(), expected.float(), atol=1e-4, rtol=1e-4)
