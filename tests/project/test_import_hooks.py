"""Functions that wait for an import: they are called until they have come to their end once."""

import sys
import threading

import pytest

from minillm import import_hooks
from minillm.import_hooks import AfterImport


@pytest.fixture
def finder(tmp_path, monkeypatch):
    """A finder that looks at a package of its own, `waited_for`, with modules `one` and `two`."""
    package = tmp_path / "waited_for"
    package.mkdir()
    for name in ("__init__", "one", "two"):
        (package / f"{name}.py").write_text("class Local: ...\n", "utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(import_hooks, "PACKAGES", ("waited_for",))
    made = AfterImport()
    yield made
    for name in [name for name in sys.modules if name.partition(".")[0] == "waited_for"]:
        del sys.modules[name]
    if made in sys.meta_path:
        sys.meta_path.remove(made)


class Failing:
    """A function that raises these one after another, and then does what it is for."""

    def __init__(self, *errors):
        self.errors, self.calls, self.seen = list(errors), 0, None

    def __call__(self):
        self.calls += 1
        if self.errors:
            raise self.errors.pop(0)
        from waited_for.one import Local

        self.seen = Local


def test_what_is_interrupted_is_done_before_the_interruption_goes_on(finder):
    function = Failing(KeyboardInterrupt())
    finder.call(function, "waited_for.one")
    with pytest.raises(KeyboardInterrupt):
        import waited_for.one
    assert function.seen is not None and not finder.waiting
    import waited_for.one

    # Not a second class of this name.
    assert waited_for.one.Local is function.seen and function.calls == 2
    spec = waited_for.one.__spec__
    assert type(spec.loader).__name__ == "SourceFileLoader" and waited_for.one.__loader__ is spec.loader
    assert finder not in sys.meta_path


def test_what_failed_is_tried_again_at_the_next_import(finder):
    function = Failing(*map(ImportError, "1234"))
    finder.call(function, "waited_for.one")
    for told in "24":
        with pytest.raises(ImportError, match=told):
            import waited_for.one
    assert function.calls == 4 and finder in sys.meta_path
    import waited_for.two

    assert function.calls == 5 and not finder.waiting
    import waited_for.one

    assert waited_for.one.Local is function.seen and function.calls == 5
    assert finder not in sys.meta_path


def test_what_fails_once_is_done(finder):
    function = Failing(ImportError("another thread"))
    finder.call(function, "waited_for.one")
    import waited_for.one

    assert waited_for.one.Local is function.seen and function.calls == 2 and finder not in sys.meta_path


def test_what_failed_when_it_was_handed_over_waits(finder):
    import waited_for.one

    function = Failing(ImportError("at once"), ImportError("again"))
    with pytest.raises(ImportError, match="again"):
        finder.call(function, "waited_for.one")
    import waited_for.two  # noqa: F401

    assert function.calls == 3 and finder not in sys.meta_path


def test_a_thread_neither_repeats_nor_awaits_what_another_is_calling(finder):
    calls, other_is_done = [], threading.Event()

    def function():
        calls.append(threading.current_thread().name)
        assert other_is_done.wait(20)

    def other():
        import waited_for.two  # noqa: F401

        other_is_done.set()

    finder.call(function, "waited_for.one", "waited_for.two")
    calling = threading.Thread(target=lambda: __import__("waited_for.one"), name="calling")
    calling.start()
    while not calls:
        pass
    thread = threading.Thread(target=other, name="other")
    thread.start()
    calling.join()
    thread.join()
    assert calls == ["calling"] and not finder.waiting
