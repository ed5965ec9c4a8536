"""What tests of training share."""

import pytest
from trl_cases import train_tokenizer


@pytest.fixture(scope="session")
def tokenizer():
    """Reads the texts of `trl_cases`; modules with texts of their own have their own."""
    return train_tokenizer()
