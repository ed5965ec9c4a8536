"""Writing folders so that nothing is lost. All that writes a folder goes through here.

What stands at a place is never deleted unasked (`require_free`), two processes never write one folder at a time
(`reserved`), and a folder changes from its old content to the new in one step, also when the process is killed or the
disk is full (`new_folder`, `updated_folder`).

While `models/my-model` is written, `models/.my-model.lock` says who writes it and `models/.my-model.partial` holds
what is not finished. A process that was killed leaves both; whoever writes the folder next removes them.
"""

import contextlib
import ctypes
import errno
import filecmp
import json
import logging
import os
import re
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

logger = logging.getLogger(__name__)

KNOWN = re.compile(
    r"(config|generation_config|tokenizer_config|tokenizer|special_tokens_map|added_tokens|chat_template"
    r"|model\.safetensors\.index)\.json|model(-\d{5}-of-\d{5})?\.safetensors|chat_template\.jinja|README\.md"
)
"""Files that saving a model or a tokenizer leaves; the others are such only in some company."""
ADAPTER = re.compile(r"adapter_config\.json|adapter_model(-\d{5}-of-\d{5})?\.safetensors")
PICKLED = re.compile(r"pytorch_model(-\d{5}-of-\d{5})?\.bin|pytorch_model\.bin\.index\.json")
VOCABULARY = re.compile(r"vocab\.json|vocab\.txt|merges\.txt|(tokenizer|spiece|sentencepiece\.bpe)\.model")
ONE_FILE = ("MiniLLMTokenizer", "PreTrainedTokenizerFast", "TokenizersBackend")
"""Tokenizers that read `tokenizer.json` and no other vocabulary."""
CODE = tuple(f"{name}_minillm" for name in ("configuration", "modeling", "tokenization"))
RELATIVE_IMPORT = re.compile(r"^\s*from \.(\w+) import", re.MULTILINE)

CONFIGS = ("config.json", "adapter_config.json", "tokenizer_config.json")
# Moved in this order, after all others: without them a folder does not load.
LAST = ("model.safetensors.index.json", *reversed(CONFIGS))
SMALL = 1 << 20
POLL = 0.1
PATIENCE = 1.0

# Of Python, Rust (safetensors, tokenizers) and torch, whose `torch.save` does not know the reason.
DISK_ERRNOS = (errno.ENOSPC, errno.EFBIG, errno.EDQUOT)
DISK_MESSAGES = re.compile(
    rf"os error ({'|'.join(map(str, DISK_ERRNOS))})\b|inline_container.*unexpected pos|PytorchStreamWriter failed",
    re.DOTALL,
)

AT_FDCWD, RENAME_EXCHANGE = -100, 2

_held: set[tuple[Path, int, int]] = set()
_stages: set[Path] = set()


class FolderInUse(OSError):
    """Another process, or another thread of this one, writes the folder; the message says which, and since when."""


def beside(folder: Path, kind: str) -> Path:
    """Where the `lock` or the `partial` content of a folder stands: beside it, where nobody takes it for a part of it.

    In a folder that is a file system of its own, or beside which nothing may be written, it stands inside.
    """
    if folder.is_dir() and (os.path.ismount(folder) or not os.access(folder.parent, os.W_OK)):
        return folder / f".minillm.{kind}"
    return folder.parent / f".{folder.name}.{kind}"


@contextlib.contextmanager
def reserved(folder: str | Path, brief: bool = False) -> Iterator[None]:
    """Nobody else writes the folder meanwhile. The lock ends with the process, however that ends.

    Args:
        folder: it need not exist; links are followed, so that all names of a folder mean the same lock.
        brief: it takes no longer than saving does. Whoever is brief waits for others that are brief.

    Raises:
        FolderInUse: somebody else writes it.
        OSError: nothing can be written beside it, or a file or a link has the name of its unfinished content.
    """
    folder = Path(folder).resolve()
    key = (folder, os.getpid(), threading.get_ident())
    if key in _held:
        yield
        return
    path = beside(folder, "lock")
    with made(path.parent):
        lock = FileLock(path)
        acquire(lock, folder, brief)
        _held.add(key)
        try:
            note = {"pid": os.getpid(), "since": f"{datetime.now():%Y-%m-%d %H:%M:%S}", "brief": brief}
            with contextlib.suppress(OSError):
                path.write_text(json.dumps(note), "utf-8")
            remove_partial(beside(folder, "partial"))
            yield
        finally:
            _held.remove(key)
            # While it is still ours: filelock lets nobody in by a file that is gone.
            with contextlib.suppress(OSError):
                path.unlink()
            lock.release()


def remove_partial(partial: Path) -> None:
    """Removes what a killed process left. FileExistsError where something else has its name."""
    if partial.is_symlink() or partial.is_file():
        what = "a link" if partial.is_symlink() else "a file"
        words = f"{what} stands where unfinished content is put: move it away, or choose another folder"
        raise FileExistsError(errno.EEXIST, words, str(partial))
    shutil.rmtree(partial, ignore_errors=True)


@contextlib.contextmanager
def made(folder: Path) -> Iterator[None]:
    """Makes a folder with its parents; those that are empty in the end go again."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            for path in missing:
                path.rmdir()


def acquire(lock: FileLock, folder: Path, brief: bool) -> None:
    """Takes the lock, at once or, where both are brief, as soon as it is free."""
    started, told = time.monotonic(), False
    while True:
        try:
            lock.acquire(blocking=False)
            return
        except Timeout:
            holder = read_note(Path(lock.lock_file))
        # A holder has not written its note in its first moment.
        known = holder or time.monotonic() - started > PATIENCE
        if known and not holder and not os.path.lexists(lock.lock_file):
            words = "no file can be made here: choose another folder"
            raise PermissionError(errno.EACCES, words, str(Path(lock.lock_file).parent))
        if known and not (brief and holder.get("brief", True)):
            who = f"process {holder['pid']} since {holder['since']}" if holder else "another process"
            raise FolderInUse(f"{folder} is being written by {who}: wait until it ends, or choose another folder")
        if known and not told:
            logger.warning(f"{folder} is being written by process {holder.get('pid', '?')}: waiting for it")
            told = True
        time.sleep(POLL)


def read_note(path: Path) -> dict[str, Any]:
    note = mapping_in(path)
    return note if {"pid", "since"} <= set(note) else {}


def require_free(folder: str | Path, model_type: str | None = None, overwrite: bool = False) -> None:
    """Checks that a folder can be written without losing what is in its place.

    Args:
        model_type: of models that `overwrite` may replace; None where nothing is ever replaced.
        overwrite: a folder with such a model, an adapter or a tokenizer, and nothing else, counts as free.

    Raises:
        ValueError: a file stands there, or a folder that is not empty and not to be replaced, or, with `model_type`, a
            link.
    """
    folder = Path(folder)
    if model_type is not None and folder.is_symlink():
        raise ValueError(f"{folder} is a link to {os.readlink(folder)}: name the folder itself, or choose another one")
    above = next(path for path in (folder, *folder.resolve().parents) if path.exists())
    if not above.is_dir():
        raise ValueError(f"{above} is a file: choose another folder")
    if above is not folder or not content(folder):
        return
    if model_type is None:
        raise ValueError(f"{folder} is not empty: remove it, or choose another folder")
    if reason := why_kept(folder, model_type):
        raise ValueError(f"{folder} is not empty and {reason}: it is never replaced; choose another folder")
    if not overwrite:
        raise ValueError(f"{folder} is not empty: `overwrite=True` replaces the model in it")


def content(folder: Path) -> set[str]:
    """Names in a folder, without what `beside` puts there; none where there is no folder."""
    if not folder.is_dir():
        return set()
    return {path.name for path in folder.iterdir()} - {beside(folder, kind).name for kind in ("lock", "partial")}


def why_kept(folder: Path, model_type: str) -> str | None:
    """Why a folder may not be replaced; None if it holds a model of this type, an adapter or a tokenizer only."""
    names = {name for name in content(folder) if not (folder / name).is_dir()}
    foreign = sorted(content(folder) - files_of_a_model(folder, names))
    if foreign:
        return f"holds {foreign[0]}, which is no file of a model"
    if not any((folder / name).is_file() for name in CONFIGS):
        return "holds no model"
    try:
        found = json.loads((folder / CONFIGS[0]).read_text("utf-8"))["model_type"]
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError):
        return f"holds a {CONFIGS[0]} that names no `model_type`"
    return None if found == model_type else f"holds a {found!r} model, not a {model_type!r} one"


def files_of_a_model(folder: Path, names: set[str]) -> set[str]:
    """Those of the names that belong to the one model, adapter or tokenizer in a folder."""
    settings = mapping_in(folder / "tokenizer_config.json")
    patterns = [KNOWN]
    if "config.json" not in names:
        patterns.append(ADAPTER)
    if not any(name.endswith(".safetensors") for name in names):
        patterns.append(PICKLED)
    if settings.get("tokenizer_class", ONE_FILE[0]) not in ONE_FILE:
        patterns.append(VOCABULARY)
    found = {name for name in names if any(pattern.fullmatch(name) for pattern in patterns)}
    return found | names & code_of_a_model(folder, settings)


def code_of_a_model(folder: Path, tokenizer_config: dict[str, Any]) -> set[str]:
    """The Python files of a saved MiniLLM, those of its tokenizer, and what they import from the folder.

    Older versions wrote a file for each module, by names that a file of somebody else may have, too.
    """
    named = tokenizer_config.get("auto_map")
    modules = re.findall(r"'(\w+)\.\w+'", str(named)) if named else []
    found, waiting = set(), [*CODE, *modules]
    while waiting:
        file = folder / f"{waiting.pop()}.py"
        if file.name not in found and file.is_file():
            found.add(file.name)
            waiting += RELATIVE_IMPORT.findall(file.read_text("utf-8", "replace"))
    return found


def mapping_in(file: Path) -> dict[str, Any]:
    """What a JSON file holds; nothing where it cannot be read."""
    try:
        found = json.loads(file.read_text("utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def require_apart(source: str | Path, out: str | Path) -> None:
    """Checks that writing `out` cannot touch what is read from `source`, by whatever links either is named.

    Raises:
        ValueError: they are the same, one is inside the other, or a file of `source` is a link into `out`.
    """
    if not Path(source).exists():
        return
    source, out = Path(source).resolve(), Path(out).resolve()
    # Not `resolve`, which raises for links in a circle.
    files = [Path(os.path.realpath(path)) for path in source.iterdir()] if source.is_dir() else []
    above_source = [path for file in (source, *files) for path in (file, *file.parents)]
    if any(same(out, path) for path in dict.fromkeys(above_source)) or any(same(source, path) for path in out.parents):
        raise ValueError(f"{out} is the source {source}, or one is inside the other: choose another folder to write")


def same(one: Path, other: Path) -> bool:
    return one == other or (one.exists() and other.exists() and one.samefile(other))


@contextlib.contextmanager
def claimed(folder: str | Path, model_type: str | None = None, overwrite: bool = False) -> Iterator[None]:
    """A free folder that nobody else writes meanwhile; arguments and errors of `require_free` and `reserved`."""
    require_free(folder, model_type, overwrite)
    with reserved(folder):
        # Somebody may have just finished.
        require_free(folder, model_type, overwrite)
        yield


@contextlib.contextmanager
def new_folder(folder: str | Path, model_type: str | None = None, overwrite: bool = False) -> Iterator[Path]:
    """A folder to write into, which takes the place of `folder` when all is written; else nothing is left of it.

    Args and errors are those of `claimed`. Whatever has come to stand at `folder` meanwhile stays, and is an error.
    """
    with claimed(folder, model_type, overwrite), staged(Path(folder).resolve()) as stage:
        yield stage
        require_free(folder, model_type, overwrite)
        target = Path(folder).resolve()
        if (older := content(target)) or stage.parent == target:
            commit(stage, target, older)
        else:
            try:
                # Takes the place of an empty folder, and of no other.
                stage.rename(target)
            except OSError:
                # A bind mount, Windows, or somebody was faster.
                require_free(folder, model_type, overwrite)
                commit(stage, target, ())


@contextlib.contextmanager
def updated_folder(folder: str | Path, outdated: Callable[[str], bool]) -> Iterator[Path]:
    """A folder to write files into that go to `folder` together when all are written; its other files stay.

    Args:
        outdated: whether a file of `folder`, by its name, goes unless it is written anew.

    Raises:
        FolderInUse: a command is writing the folder. Others that save into it are waited for.
        OSError: the disk is full; `folder` is as it was.
    """
    folder = Path(folder).resolve()
    if any(stage in (folder, *folder.parents) for stage in _stages):
        # A part of what is being written already.
        yield folder
        return
    with reserved(folder, brief=True), staged(folder) as stage:
        yield stage
        commit(stage, folder, filter(outdated, content(folder)))


@contextlib.contextmanager
def staged(folder: Path) -> Iterator[Path]:
    """A folder beside `folder` with its permissions, which is gone in the end."""
    stage = beside(folder, "partial")
    with full_disk_in_words(folder):
        stage.mkdir()
        _stages.add(stage)
        try:
            if folder.is_dir():
                with contextlib.suppress(OSError):
                    shutil.copystat(folder, stage)
                    os.chown(stage, folder.stat().st_uid, folder.stat().st_gid)
            yield stage
        finally:
            _stages.remove(stage)
            shutil.rmtree(stage, ignore_errors=True)


@contextlib.contextmanager
def full_disk_in_words(folder: str | Path) -> Iterator[None]:
    """Whatever a library raises where the disk is full becomes one OSError that says so."""
    try:
        yield
    except Exception as error:
        if getattr(error, "errno", None) in DISK_ERRNOS or DISK_MESSAGES.search(str(error)):
            words = "the disk is full, or a quota is reached: free some space, then do the same again"
            raise OSError(errno.ENOSPC, words, str(folder)) from error
        raise


def commit(stage: Path, folder: Path, outdated: Iterable[str]) -> None:
    """Brings what was written to `folder`, in one step wherever something older changes with it.

    Args:
        stage: what was written; of the same file system.
        outdated: names in `folder` of what goes, unless it was written anew.
    """
    if not folder.exists():
        stage.rename(folder)
        return
    written, kept = {path.name for path in stage.iterdir()}, content(folder)
    outdated = set(outdated) - written
    for name in written & kept:
        if (folder / name).is_dir() != (stage / name).is_dir():
            raise FileExistsError(
                errno.EEXIST, "a folder stands where a file belongs, or the other way", folder / name
            )
    changed = {name for name in written if not unchanged(stage / name, folder / name)}
    older = outdated | changed & kept
    if not older or len(changed | older) == 1:
        # Nothing older changes, or one file does, which is one step.
        move(stage, folder, changed, outdated)
    elif exchanged(stage, folder, kept - written - outdated):
        # What others have written here in the meantime.
        for path in list(stage.iterdir()):
            if path.name not in outdated and not os.path.lexists(folder / path.name):
                path.rename(folder / path.name)
    else:
        # Without a config nothing loads: old and new content are never taken for one model.
        for name in set(CONFIGS) & (written | outdated):
            (folder / name).unlink(missing_ok=True)
        move(stage, folder, written, outdated)


def unchanged(new: Path, old: Path) -> bool:
    """Whether a small file is there already, with the same bytes."""
    if new.is_dir() or old.is_symlink() or not old.is_file() or new.stat().st_size > SMALL:
        return False
    return filecmp.cmp(new, old, shallow=False)


def exchanged(stage: Path, folder: Path, kept: Iterable[str]) -> bool:
    """Swaps the two in one step, after `stage` got the other files of `folder` too; False where that cannot be done.

    It cannot without hard links or Linux' `renameat2`, as on Windows, macOS and NFS; and a process would lose its
    working directory.
    """
    if stage.parent == folder or sys.platform != "linux" or works_in(folder):
        return False
    try:
        for name in kept:
            link(folder / name, stage / name)
        libc = ctypes.CDLL(None, use_errno=True)
        places = (AT_FDCWD, os.fsencode(stage), AT_FDCWD, os.fsencode(folder))
        return libc.renameat2(*places, RENAME_EXCHANGE) == 0
    except (OSError, AttributeError):
        return False


def link(old: Path, new: Path) -> None:
    """Gives a file, a link or a folder of them a second name."""
    if old.is_symlink():
        new.symlink_to(os.readlink(old))
    elif old.is_dir():
        shutil.copytree(old, new, symlinks=True, copy_function=os.link)
    else:
        os.link(old, new)


def works_in(folder: Path) -> bool:
    with contextlib.suppress(OSError):
        return Path.cwd().resolve().is_relative_to(folder)
    return False


def move(stage: Path, folder: Path, written: Iterable[str], outdated: Iterable[str]) -> None:
    """Moves file by file, those last without which a folder does not load."""
    for name in outdated:
        remove(folder / name)
    for name in sorted(written, key=lambda name: (LAST.index(name) if name in LAST else -1, name)):
        if (stage / name).is_dir():
            remove(folder / name)
        try:
            os.replace(stage / name, folder / name)
        except OSError as error:
            if error.errno != errno.EXDEV:
                raise
            # A bind mount: the same disk, and yet nothing is renamed into it.
            with new_file(folder / name) as partial:
                shutil.move(stage / name, partial)


def remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


@contextlib.contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """A file to write that takes the place of `path` when it is complete; its name ends as that of `path` does."""
    partial = path.with_name(f".partial-{path.name}")
    try:
        with full_disk_in_words(path):
            yield partial
            os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def write_atomically(path: Path, text: str) -> None:
    """Writes a file so that it is never seen half-written."""
    with new_file(path) as partial:
        partial.write_text(text, "utf-8")
