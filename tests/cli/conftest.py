"""A tiny corpus and tiny models that several modules train."""

import pytest
from cli_cases import save_small_model, small_tokenizer, write_corpus


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """Folders by name: models, a tokenizer and a corpus."""
    root = tmp_path_factory.mktemp("small")
    folders = {name: save_small_model(root / name, name) for name in ("causal", "prefix")}
    small_tokenizer().save_pretrained(root / "tokenizer")
    return {**folders, "tokenizer": root / "tokenizer", "corpus": write_corpus(root / "corpus", files=12)}
