"""What tests of attention share."""

import pytest
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask


@pytest.fixture
def my_kernel(monkeypatch):
    """A back end that MiniLLM does not know, made of transformers' own SDPA."""
    monkeypatch.setitem(AttentionInterface._global_mapping, "my_kernel", sdpa_attention_forward)
    monkeypatch.setitem(AttentionMaskInterface._global_mapping, "my_kernel", sdpa_mask)
    return "my_kernel"
