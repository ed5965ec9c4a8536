"""Writing folders: what stands there is kept, one writer at a time, old or new content after a kill or a full disk."""

import contextlib
import errno
import json
import os
import random
import resource
import signal
import stat
import subprocess
import sys
import time

import pytest
from cli_cases import fail, python_source, save_small_model, succeed, tree
from folder_cases import (
    ENDINGS,
    SIZES,
    at_event,
    events_of,
    fingerprint,
    in_child,
    llama,
    loaded,
    loaded_tokenizer,
    model,
    processes,
    tokenizer,
)
from transformers import LlamaConfig, LlamaForCausalLM

from minillm import MiniLLMForCausalLM, MiniLLMTokenizer
from minillm.conversion import convert, export
from minillm.publishing import folders
from minillm.publishing.folders import FolderInUse, claimed, new_folder, require_free, reserved, updated_folder

pytestmark = pytest.mark.usefixtures("without_bars")


def overwrite_by_conversion(folder):
    convert(folder.parent / "llama", folder, overwrite=True)


CASES = {
    "another config": (lambda folder: model(1, hidden_size=24).save_pretrained(folder), loaded),
    "the same config": (lambda folder: model(1, eos_token_id=1).save_pretrained(folder), loaded),
    "whole to shards": (lambda folder: model(1).save_pretrained(folder, max_shard_size="6KB"), loaded),
    "convert": (overwrite_by_conversion, loaded),
    "tokenizer": (lambda folder: tokenizer("other words", None).save_pretrained(folder), loaded_tokenizer),
}


def prepare(case, root):
    folder = root / "model"
    model(0).save_pretrained(folder)
    if case == "tokenizer":
        tokenizer("some text", "{{ messages }}").save_pretrained(folder)
    if case == "convert":
        llama(root / "llama")
    return folder


@pytest.mark.mostly_thorough(
    "another config-killed",
    "another config-full disk",
    "whole to shards-killed",
    "whole to shards-full disk",
    "shards to whole-killed",
    "tokenizer-killed",
    "tokenizer-full disk",
)
@pytest.mark.parametrize("ending", ENDINGS)
@pytest.mark.parametrize("case", [*CASES, "shards to whole", "shards to other shards"])
def test_old_or_new_loads_where_a_save_ends(case, ending, tmp_path):
    end_saves(case, ending, tmp_path, lambda count: [count // 2, *range(count - 9, count, 3)])


@pytest.mark.mostly_thorough(
    "another config-killed", "whole to shards-full disk", "shards to whole-killed", "tokenizer-killed"
)
@pytest.mark.slow
@pytest.mark.parametrize("ending", ENDINGS)
@pytest.mark.parametrize("case", [*CASES, "shards to whole", "shards to other shards"])
def test_old_or_new_loads_wherever_else_a_save_ends(case, ending, tmp_path):
    end_saves(case, ending, tmp_path, lambda count: sorted({*range(0, count, 10), *range(count - 30, count)}))


def end_saves(case, ending, tmp_path, choose):
    """Chosen file operations of a save are the last one; a run of this process then recovers."""
    source = "whole to shards" if "shards" in case else case
    save, load = CASES[source]
    if case == "shards to whole":
        save = CASES["another config"][0]
    sharded = case.startswith("shards")
    folder = prepare(source, tmp_path)
    if sharded:
        model(0).save_pretrained(folder, max_shard_size="6KB")
    old = load(folder)
    save(tmp_path / "fresh")
    new = load(tmp_path / "fresh")
    count = events_of(tmp_path, lambda: save(folder))
    assert load(folder) == new
    assert old is not None and new is not None and old != new and count > 20
    for step in choose(count):
        for path in [*folder.iterdir()] if folder.exists() else []:
            path.unlink()
        prepare(source, tmp_path) if source != "convert" else model(0).save_pretrained(folder)
        if sharded:
            model(0).save_pretrained(folder, max_shard_size="6KB")

        def cut_off(step=step):
            at_event(step, tmp_path, ENDINGS[ending])
            save(folder)

        in_child(cut_off)
        found = load(folder)
        assert found in (old, new), (step, tree(tmp_path))
    save(folder)
    assert load(folder) == new
    assert {path.name for path in tmp_path.iterdir()} <= {"model", "llama", "fresh"}


@pytest.mark.slow
def test_without_an_exchange_nothing_is_ever_a_mixture(tmp_path, monkeypatch):
    monkeypatch.setattr(folders, "exchanged", lambda *arguments: False)
    save, folder = CASES["whole to shards"][0], tmp_path / "model"
    model(0, eos_token_id=2).save_pretrained(folder, max_shard_size="6KB")
    old, count = loaded(folder), events_of(tmp_path, lambda: save(folder))
    new = loaded(folder)
    assert old[1] != new[1]
    unloadable = 0
    for step in range(count - 25, count, 3):
        model(0, eos_token_id=2).save_pretrained(folder, max_shard_size="6KB")

        def cut_off(step=step):
            at_event(step, tmp_path, ENDINGS["killed"])
            save(folder)

        in_child(cut_off)
        found = loaded(folder)
        assert found in (old, new, None)
        unloadable += found is None
    assert unloadable < 9
    save(folder)
    assert loaded(folder) == new and tree(tmp_path)[0] == "model"
    assert not [name for name in tree(tmp_path) if name.startswith(".")]


@pytest.mark.slow
def test_kills_at_random_moments(tmp_path):
    kill_at_random(tmp_path, 12)


@pytest.mark.thorough
@pytest.mark.slow
def test_many_kills_at_random_moments(tmp_path):
    kill_at_random(tmp_path, 300)


def kill_at_random(tmp_path, times):
    seed = random.randrange(1 << 30)
    print(f"seed {seed}")
    rng, folder = random.Random(seed), tmp_path / "model"
    models = [model(0), model(1, hidden_size=24)]
    shards = ({}, {"max_shard_size": "6KB"})
    models[0].save_pretrained(folder)
    started = time.monotonic()
    models[1].save_pretrained(folder)
    took, contents = time.monotonic() - started, []
    for one in models:
        one.save_pretrained(tmp_path / "whole")
        contents.append(loaded(tmp_path / "whole"))
    for _ in range(times):
        saving, options = rng.choice(models), rng.choice(shards)
        child = processes.Process(target=saving.save_pretrained, args=(folder,), kwargs=options)
        child.start()
        time.sleep(rng.uniform(0, 1.5 * took))
        os.kill(child.pid, signal.SIGKILL)
        child.join()
        assert loaded(folder) in contents
    models[0].save_pretrained(folder)
    assert loaded(folder) == contents[0]
    assert {path.name for path in tmp_path.iterdir()} == {"model", "whole"}


# --- what else is in the folder ---


def test_other_files_stay(tmp_path):
    folder = tmp_path / "model"
    model(0).save_pretrained(folder, max_shard_size="6KB")
    (folder / "thesis.txt").write_text("years of work", "utf-8")
    (folder / "model.fp16.safetensors").write_bytes(b"another variant")
    (folder / "README.md").write_text("my own card", "utf-8")
    (folder / "runs" / "one").mkdir(parents=True)
    (folder / "runs" / "one" / "log").write_text("log", "utf-8")
    (folder / "link").symlink_to("thesis.txt")
    folder.chmod(0o750)
    log = (folder / "runs" / "one" / "log").open("a", encoding="utf-8")
    model(1, hidden_size=24).save_pretrained(folder)
    with log:
        log.write(", written on")
    assert (folder / "thesis.txt").read_text("utf-8") == "years of work"
    assert (folder / "README.md").read_text("utf-8") == "my own card"
    assert (folder / "runs" / "one" / "log").read_text("utf-8") == "log, written on"
    assert os.readlink(folder / "link") == "thesis.txt" and (folder / "model.fp16.safetensors").exists()
    assert stat.S_IMODE(folder.stat().st_mode) == 0o750
    assert not list(folder.glob("model*-of-*")) and not list(folder.glob("*.index.json"))
    assert loaded(folder)[0] == 2


def test_a_single_changed_file_leaves_the_folder_itself(tmp_path):
    model(0).save_pretrained(tmp_path / "model")
    before = (tmp_path / "model").stat().st_ino
    model(1, eos_token_id=1).save_pretrained(tmp_path / "model")
    assert (tmp_path / "model").stat().st_ino == before
    assert loaded(tmp_path / "model") == (1, fingerprint(model(1)))


def test_what_others_write_meanwhile_stays(tmp_path):
    folder = tmp_path / "model"
    model(0).save_pretrained(folder)
    usual = folders.link

    def link(old, new):
        (folder / "rng_state_1.pth").write_text("of another rank", "utf-8")
        usual(old, new)

    (folder / "notes.txt").write_text("mine", "utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(folders, "link", link)
        model(1, hidden_size=24).save_pretrained(folder)
    assert (folder / "rng_state_1.pth").exists() and (folder / "notes.txt").exists() and loaded(folder)[0] == 2


def test_saving_into_the_working_directory(tmp_path, monkeypatch):
    model(0).save_pretrained(tmp_path / "model")
    monkeypatch.chdir(tmp_path / "model")
    model(1, hidden_size=24).save_pretrained(".")
    assert os.path.samefile(".", tmp_path / "model") and loaded(".")[0] == 2
    assert tree(tmp_path)[0] == "model"


def test_saving_through_a_link_and_into_a_folder_without_room_beside(tmp_path, monkeypatch):
    model(0).save_pretrained(tmp_path / "model")
    (tmp_path / "link").symlink_to("model")
    model(1, hidden_size=24).save_pretrained(tmp_path / "link")
    assert (tmp_path / "link").is_symlink() and loaded(tmp_path / "model")[0] == 2
    # As of a volume of a container.
    monkeypatch.setattr(os.path, "ismount", lambda path: os.fspath(path) == str(tmp_path / "model"))
    model(2).save_pretrained(tmp_path / "model")
    assert loaded(tmp_path / "model")[0] == 3
    assert not [name for name in tree(tmp_path) if ".minillm" in name or ".lock" in name]


def test_saving_into_a_bind_mount(tmp_path, monkeypatch):
    model(0).save_pretrained(tmp_path / "model")
    (tmp_path / "empty").mkdir()
    usual = os.replace

    def replace(old, new):
        if ".partial" in os.fspath(old) and os.path.dirname(old) != os.path.dirname(new):
            raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))
        usual(old, new)

    def rename(old, new):
        raise OSError(errno.EBUSY, os.strerror(errno.EBUSY))

    monkeypatch.setattr(os, "replace", replace)
    monkeypatch.setattr(folders, "exchanged", lambda *arguments: False)
    model(1, hidden_size=24).save_pretrained(tmp_path / "model")
    monkeypatch.setattr(folders.Path, "rename", rename)
    with new_folder(tmp_path / "empty") as folder:
        (folder / "file").write_text("text", "utf-8")
    assert loaded(tmp_path / "model")[0] == 2 and (tmp_path / "empty" / "file").read_text("utf-8") == "text"
    assert not [name for name in tree(tmp_path) if "partial" in name]


def test_a_variant_leaves_the_other_weights(tmp_path):
    model(0).save_pretrained(tmp_path)
    # By position too, as transformers takes it.
    model(1, eos_token_id=1).save_pretrained(tmp_path, True, None, False, "5GB", "fp16")
    assert loaded(tmp_path) == (1, fingerprint(model(0)))
    assert fingerprint(MiniLLMForCausalLM.from_pretrained(tmp_path, variant="fp16")) == fingerprint(model(1))


def test_a_process_that_does_not_write_writes_nothing(tmp_path):
    model(0).save_pretrained(tmp_path / "model", is_main_process=False)
    assert tree(tmp_path / "model") == []


def test_a_tokenizer_names_its_files_and_takes_old_templates_away(tmp_path):
    files = tokenizer("some text", "{{ messages }}").save_pretrained(str(tmp_path / "tokenizer"))
    assert sorted(files) == sorted(
        str(tmp_path / "tokenizer" / name)
        for name in ("tokenizer_config.json", "tokenizer.json", "chat_template.jinja")
    )
    tokenizer("other words", None).save_pretrained(tmp_path / "tokenizer")
    assert MiniLLMTokenizer.from_pretrained(tmp_path / "tokenizer").chat_template is None
    assert tokenizer("x", None).save_pretrained(tmp_path / "tokenizer" / "tokenizer.json") is None


# --- one writer at a time ---


def hold(folder, ready, brief):
    with reserved(folder, brief):
        ready.set()
        time.sleep(60)


@pytest.fixture
def holder(request):
    """Starts processes that write a folder until they are killed."""
    children = []

    def start(folder, brief=False):
        ready = processes.Event()
        child = processes.Process(target=hold, args=(folder, ready, brief))
        child.start()
        children.append(child)
        assert ready.wait(20)
        return child

    yield start
    for child in children:
        child.kill()
        child.join()


def test_a_lock_names_its_holder_and_ends_with_it(holder, tmp_path):
    child = holder(tmp_path / "deep" / "out")
    (tmp_path / "link").symlink_to(tmp_path / "deep")
    for name in (tmp_path / "deep" / "out", tmp_path / "link" / "out"):
        with pytest.raises(FolderInUse) as caught, reserved(name):
            pass
        told = str(caught.value)
        assert f"process {child.pid} since 20" in told and str(tmp_path / "deep" / "out") in told
        assert "choose another folder" in told
    (tmp_path / "deep" / ".out.partial").mkdir()
    child.kill()
    child.join()
    with reserved(tmp_path / "deep" / "out"):
        assert tree(tmp_path / "deep") == [".out.lock"]
        # Again, as commands do around functions.
        with reserved(tmp_path / "deep" / "out"):
            pass
    assert tree(tmp_path / "deep") == []
    with pytest.raises(ValueError), claimed(tmp_path / "new" / "out"):
        raise ValueError
    assert not (tmp_path / "new").exists()


def test_saving_waits_for_a_save_and_not_for_a_command(holder, tmp_path):
    child = holder(tmp_path / "model")
    with pytest.raises(FolderInUse):
        model(0).save_pretrained(tmp_path / "model")
    child.kill()
    child.join()
    child = holder(tmp_path / "model", brief=True)
    waiting = processes.Process(target=model(0).save_pretrained, args=(tmp_path / "model",))
    waiting.start()
    time.sleep(0.5)
    assert waiting.is_alive() and not (tmp_path / "model").exists()
    child.kill()
    waiting.join()
    assert waiting.exitcode == 0 and loaded(tmp_path / "model")


def test_many_that_save_into_one_folder(tmp_path):
    models = [model(seed, hidden_size=16 + 8 * (seed % 2)) for seed in range(6)]
    children = [processes.Process(target=one.save_pretrained, args=(tmp_path / "model",)) for one in models]
    for child in children:
        child.start()
    for child in children:
        child.join()
    assert [child.exitcode for child in children] == [0] * 6
    seed = loaded(tmp_path / "model")[0] - 1
    assert loaded(tmp_path / "model")[1] == fingerprint(models[seed])
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.slow
def test_of_two_conversions_one_is_refused_and_one_is_whole(tmp_path):
    llama(tmp_path / "llama")

    def run(results, barrier):
        barrier.wait()
        try:
            convert(tmp_path / "llama", tmp_path / "ours")
            results.put("written")
        except (FolderInUse, ValueError) as error:
            results.put(str(error))

    results, barrier = processes.Queue(), processes.Barrier(2)
    children = [processes.Process(target=run, args=(results, barrier)) for _ in range(2)]
    for child in children:
        child.start()
    told = sorted(results.get() for _ in children)
    for child in children:
        child.join()
    assert told.count("written") == 1
    assert any(words in "".join(told) for words in ("is being written by process", "is not empty"))
    assert loaded(tmp_path / "ours") and sorted(path.name for path in tmp_path.iterdir()) == ["llama", "ours"]


@pytest.fixture(scope="module")
def things(tmp_path_factory):
    """A model of ours, a llama, and a text."""
    root = tmp_path_factory.mktemp("things")
    save_small_model(root / "model")
    LlamaForCausalLM(LlamaConfig(**{**SIZES, "vocab_size": 1000})).save_pretrained(root / "llama")
    (root / "texts").mkdir()
    for number in range(4):
        (root / "texts" / f"{number}.py").write_text(python_source(number), "utf-8")
    return root


def commands(things, out):
    model, text = things / "model", things / "texts"
    return {
        "convert": ("convert", "--from", things / "llama", "--to", out),
        "export": ("export", model, out),
        "export --as": ("export", model, out, "--as", "llama"),
        "train": ("train", "--model", model, "--data", text, "--out", out, "--max-steps", 2, "--batch-size", 2),
        "tokenizer train": ("tokenizer", "train", text, "--out", out, "--vocab-size", 400),
        "tokenizer extend": ("tokenizer", "extend", model, text, "--num-new", 3, "--out", out),
        "tokenizer report": ("tokenizer", "report", model, text, "--out", out),
        "demo": ("demo", "--out", out, "--corpus", text, "--steps", 2),
    }


COMMANDS = list(commands(folders.Path(), folders.Path()))


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_say_who_writes_the_folder(command, holder, things, tmp_path):
    child = holder(tmp_path / "out")
    told = fail(*commands(things, tmp_path / "out")[command])
    assert f"{tmp_path / 'out'} is being written by process {child.pid} since " in told
    assert tree(tmp_path) == [".out.lock"]


def test_checkpoints_are_locked_too(holder, things, tmp_path):
    child = holder(tmp_path / "out-checkpoints")
    told = fail(*commands(things, tmp_path / "out")["train"])
    assert f"out-checkpoints is being written by process {child.pid}" in told


# --- what stands there ---


def test_nothing_is_replaced_unasked(things, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.txt").write_text("years of work", "utf-8")
    file = tmp_path / "file"
    file.write_text("text", "utf-8")
    before = tree(tmp_path)
    for write in (
        lambda target, **options: convert(things / "llama", target, **options),
        lambda target, **options: export(things / "model", target, "llama", **options),
    ):
        for target, words in ((out, "is not empty"), (file, "is a file"), (file / "inside", "is a file")):
            for overwrite in (False, True):
                with pytest.raises(ValueError, match=words):
                    write(target, overwrite=overwrite)
        (out / "config.json").write_text('{"model_type": "minillm"}', "utf-8")
        with pytest.raises(ValueError, match=r"thesis\.txt, which is no file of a model"):
            write(out, overwrite=True)
        (out / "config.json").unlink()
    assert tree(tmp_path) == before and (out / "thesis.txt").read_text("utf-8") == "years of work"


@pytest.mark.slow
def test_overwrite_replaces_an_older_model_only(things, tmp_path):
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    convert(things / "llama", ours)
    (ours / "tokenizer.json").write_text("of an older model", "utf-8")
    with pytest.raises(ValueError, match="`overwrite=True` replaces the model in it"):
        convert(things / "llama", ours)
    convert(things / "llama", ours, overwrite=True)
    assert loaded(ours) and not (ours / "tokenizer.json").exists()
    export(ours, theirs, "llama")
    export(ours, theirs, "llama", overwrite=True)
    LlamaForCausalLM.from_pretrained(theirs)
    with pytest.raises(ValueError, match="holds a 'llama' model, not a 'minillm' one"):
        convert(things / "llama", theirs, overwrite=True)
    with pytest.raises(ValueError, match="holds a 'minillm' model, not a 'llama' one"):
        export(things / "model", ours, "llama", overwrite=True)
    (tmp_path / "link").symlink_to("ours")
    before = tree(ours)
    with pytest.raises(ValueError, match="a link to"):
        convert(things / "llama", tmp_path / "link", overwrite=True)
    assert tree(ours) == before and (tmp_path / "link").is_symlink()


FOREIGN = {
    "train.py": "from transformers import Trainer",
    "cache.py": "from .modeling_minillm import MiniLLMForCausalLM",
    "vocab.txt": "my words",
    "merges.txt": "a b",
    "vocab.json": "{}",
    "tokenizer.model": "sentences",
    "pytorch_model.bin": "weights of mine",
    "adapter_model.safetensors": "weeks of training",
    "adapter_config.json": "{}",
}


@pytest.mark.mostly_thorough("train.py", "vocab.txt", "adapter_config.json")
@pytest.mark.parametrize("name", FOREIGN)
def test_overwrite_keeps_what_only_looks_like_a_file_of_the_model(name, things, tmp_path):
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    model(0).save_pretrained(ours)
    tokenizer("some words", None).save_pretrained(ours)
    export(ours, theirs, "llama")
    for folder in (ours, theirs):
        (folder / name).write_text(FOREIGN[name], "utf-8")
    with pytest.raises(ValueError, match=rf"holds {name}, which is no file of a model"):
        convert(things / "llama", ours, overwrite=True)
    with pytest.raises(ValueError, match=rf"holds {name}, which is no file of a model"):
        export(things / "model", theirs, "llama", overwrite=True)
    assert all((folder / name).read_text("utf-8") == FOREIGN[name] for folder in (ours, theirs))


def test_overwrite_replaces_models_of_older_versions_and_carried_tokenizers(things, tmp_path):
    """A Python file for each module; a tokenizer with code and a vocabulary of its own."""
    ours = tmp_path / "ours"
    model(0).save_pretrained(ours)
    (ours / "modeling_minillm.py").write_text("from .configuration_minillm import A\nfrom .cache import B\n", "utf-8")
    (ours / "cache.py").write_text("from .checks import (\n    A,\n)\n", "utf-8")
    (ours / "checks.py").write_text("A = 1\n", "utf-8")
    settings = {"tokenizer_class": "OwnTokenizer", "auto_map": {"AutoTokenizer": ["own.OwnTokenizer", None]}}
    (ours / "tokenizer_config.json").write_text(json.dumps(settings), "utf-8")
    (ours / "own.py").write_text("from .words import A\n", "utf-8")
    for name in ("words.py", "vocab.txt"):
        (ours / name).write_text("", "utf-8")
    convert(things / "llama", ours, overwrite=True)
    assert loaded(ours) and {path.suffix for path in ours.iterdir()} == {".json", ".py", ".md", ".safetensors"}
    assert {path.stem for path in ours.glob("*.py")} == {"configuration_minillm", "modeling_minillm"}


def test_the_source_is_never_the_output(tmp_path):
    source, ours = llama(tmp_path / "llama"), tmp_path / "ours"
    convert(source, ours)
    (tmp_path / "link").symlink_to("llama")
    (tmp_path / "to-ours").symlink_to("ours")
    linked = tmp_path / "linked"
    linked.mkdir()
    for path in ours.iterdir():
        (linked / path.name).symlink_to(path)
    before = tree(tmp_path)
    for out in (source, tmp_path / "link", source / "inside", tmp_path / "link" / "inside", tmp_path):
        with pytest.raises(ValueError, match="one is inside the other"):
            convert(source, out, overwrite=True)
    for given, out in ((ours, tmp_path / "to-ours"), (tmp_path / "to-ours", ours), (linked, ours)):
        with pytest.raises(ValueError, match="one is inside the other"):
            export(given, out, "llama", overwrite=True)
    assert tree(tmp_path) == before


def test_what_comes_while_a_folder_is_written_stays(tmp_path):
    with pytest.raises(ValueError, match="is not empty"), new_folder(tmp_path / "out") as folder:
        (folder / "config.json").write_text("{}", "utf-8")
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "thesis.txt").write_text("years of work", "utf-8")
    assert tree(tmp_path) == ["out", "out/thesis.txt"]


def test_empty_folders_and_links_to_them_are_free(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to("empty")
    (tmp_path / "nowhere").symlink_to("missing")
    for name in ("empty", "link", "nowhere", "new/deep"):
        require_free(tmp_path / name)
    for name in ("link", "nowhere"):
        with new_folder(tmp_path / name) as folder:
            (folder / "file").write_text(name, "utf-8")
        assert (tmp_path / name).is_symlink()
    assert tree(tmp_path) == ["empty", "empty/file", "link", "missing", "missing/file", "nowhere"]


@pytest.mark.parametrize("target", ["empty", "missing", "model"])
def test_conversions_refuse_a_link(target, things, tmp_path):
    (tmp_path / "empty").mkdir()
    model(0).save_pretrained(tmp_path / "model")
    (tmp_path / "link").symlink_to(target)
    before = tree(tmp_path)
    for overwrite in (False, True):
        with pytest.raises(ValueError, match=rf"link is a link to {target}"):
            convert(things / "llama", tmp_path / "link", overwrite=overwrite)
        with pytest.raises(ValueError, match=rf"link is a link to {target}"):
            export(things / "model", tmp_path / "link", "llama", overwrite=overwrite)
    for command in ("convert", "export --as"):
        assert "link is " in fail(*commands(things, tmp_path / "link")[command])
    assert tree(tmp_path) == before


@pytest.mark.parametrize("kind", ["file", "link"])
def test_what_has_the_name_of_unfinished_content_is_named_and_stays(kind, things, tmp_path):
    partial = tmp_path / ".out.partial"
    if kind == "link":
        (tmp_path / "elsewhere").mkdir()
        partial.symlink_to("elsewhere")
    else:
        partial.write_text("mine", "utf-8")
    before = tree(tmp_path)
    told = fail(*commands(things, tmp_path / "out")["convert"])
    assert f"a {kind} stands where unfinished content is put: move it away" in told and ".out.partial" in told
    assert tree(tmp_path) == before


@pytest.mark.skipif(sys.platform != "linux", reason="/proc is Linux's")
def test_a_place_where_no_file_can_be_made_is_no_folder_in_use():
    with pytest.raises(PermissionError, match=r"no file can be made here.*/proc"), reserved("/proc/x"):
        pass


def test_a_report_replaces_only_a_report(things, tmp_path):
    (tmp_path / "report.md").write_text("# My report\n", "utf-8")
    report = commands(things, tmp_path)["tokenizer report"]
    assert "is no report on a tokenizer" in fail(*report)
    assert tree(tmp_path) == ["report.md"]
    (tmp_path / "report.md").unlink()
    succeed(*report)
    succeed(*report)
    assert tree(tmp_path) == ["report.json", "report.md", "report.png"]


# --- a full disk, as far as a test can fill one: no file of this process grows beyond some bytes ---


@contextlib.contextmanager
def small_files_only(size):
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, old[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)


SLOW = {"demo": pytest.mark.slow}


@pytest.mark.mostly_thorough("export-2000", "tokenizer train-2000")
@pytest.mark.parametrize("size", [2_000, 35_000])
@pytest.mark.parametrize("command", [pytest.param(name, marks=SLOW.get(name, ())) for name in COMMANDS])
def test_a_full_disk_is_one_line_and_another_run_recovers(command, size, things, tmp_path):
    """The larger size is that of files which Rust (weights) and torch (states of the optimizer) write."""
    if size > 9_000:
        size = 400_000 if command == "train" else 3_000 if "tokenizer" in command else size
    arguments = commands(things, tmp_path / "out")[command]
    with small_files_only(size):
        told = fail(*arguments)
    assert "the disk is full" in told
    if command not in ("demo", "tokenizer report"):
        assert not (tmp_path / "out").exists()
    succeed(*arguments)
    hidden = [name for name in tree(tmp_path) if name.rpartition("/")[2].startswith(".")]
    assert hidden == []


def test_json_of_a_holder_that_is_damaged_names_nobody(holder, tmp_path):
    holder(tmp_path / "out")
    (tmp_path / ".out.lock").write_text(json.dumps(["?"]), "utf-8")
    with pytest.raises(FolderInUse, match="written by another process"), reserved(tmp_path / "out"):
        pass


def test_an_error_leaves_a_folder_as_it_was(tmp_path):
    (tmp_path / "out").mkdir()
    with pytest.raises(KeyError), updated_folder(tmp_path / "out", lambda name: True) as folder:
        (folder / "file").write_text("new", "utf-8")
        raise KeyError
    assert tree(tmp_path) == ["out"]


# --- whole processes ---


def command(*arguments):
    code = "import sys; from minillm.cli.main import app; app()"
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


@pytest.mark.slow
def test_a_training_that_is_killed_goes_on_to_the_same_weights(things, tmp_path):
    seed = random.randrange(1 << 30)
    print(f"seed {seed}")
    texts = things / "texts"
    arguments = ("train", "--model", things / "model", "--data", texts, "--max-steps", 200, "--batch-size", 2)
    started = time.monotonic()
    succeed(*arguments, "--out", tmp_path / "whole")
    took, rng = time.monotonic() - started, random.Random(seed)
    for number in range(3):
        out = tmp_path / f"out{number}"
        running = command(*arguments, "--out", out)
        while not (tmp_path / f"out{number}-checkpoints").exists() and running.poll() is None:
            time.sleep(0.02)
        time.sleep(rng.uniform(0, took / 2))
        running.kill()
        assert running.communicate()[1] == "" and running.returncode == -signal.SIGKILL
        assert not out.exists()
        succeed(*arguments, "--out", out)
        assert loaded(out) == loaded(tmp_path / "whole")
    assert not [name for name in tree(tmp_path) if name.rpartition("/")[2].startswith(".")]


@pytest.mark.slow
def test_of_two_trainings_one_is_refused_and_one_is_whole(things, tmp_path):
    arguments = (
        "train",
        "--model",
        things / "model",
        "--data",
        things / "texts",
        "--max-steps",
        30,
        "--batch-size",
        2,
    )
    pair = [command(*arguments, "--out", tmp_path / "out", "--seed", seed) for seed in (1, 2)]
    told = [process.communicate()[1] for process in pair]
    assert sorted(process.returncode for process in pair) == [0, 1]
    refused = next(index for index, process in enumerate(pair) if process.returncode)
    assert f"out is being written by process {pair[1 - refused].pid} since" in " ".join(told[refused].split())
    succeed(*arguments, "--out", tmp_path / "alone", "--seed", 2 - refused)
    assert loaded(tmp_path / "out") == loaded(tmp_path / "alone")
