"""What tests of commands share."""

import pytest
from cli_cases import write_corpus


@pytest.fixture(autouse=True)
def wide_terminal(monkeypatch):
    """Tables are not wrapped, so that their cells can be found."""
    monkeypatch.setattr("minillm.cli.console.console._width", 400)


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    """A folder of twelve made-up Python sources."""
    return write_corpus(tmp_path_factory.mktemp("data") / "corpus", files=12)
