"""What tests of commands share."""

import pytest
from cli_cases import save_small_model, small_tokenizer, write_corpus


@pytest.fixture(autouse=True)
def wide_terminal(monkeypatch):
    """Tables are not wrapped, so that their cells can be found."""
    monkeypatch.setattr("minillm.cli.console.console._width", 400)


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    """A folder of twelve made-up Python sources."""
    return write_corpus(tmp_path_factory.mktemp("data") / "corpus", files=12)


@pytest.fixture(scope="module")
def small(tmp_path_factory, corpus):
    """Folders by name: models, a tokenizer and a corpus."""
    root = tmp_path_factory.mktemp("small")
    folders = {name: save_small_model(root / name, name) for name in ("causal", "prefix")}
    small_tokenizer().save_pretrained(root / "tokenizer")
    return {**folders, "tokenizer": root / "tokenizer", "corpus": corpus}
