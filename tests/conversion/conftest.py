"""What tests of conversion share."""

import pytest
from conversion_cases import save_native


@pytest.fixture
def llama(tmp_path):
    """A native LLaMA and its folder."""
    return save_native(tmp_path / "native"), tmp_path / "native"
