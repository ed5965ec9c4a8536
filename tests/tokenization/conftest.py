"""One trained tokenizer of each kind, which no test changes."""

import pytest
from tokenizer_cases import EXACT, MODELS, TEXTS

from minillm.tokenization.tokenization_minillm import MiniLLMTokenizer


@pytest.fixture(scope="session")
def tokenizers():
    return {
        model: MiniLLMTokenizer.train_from_iterator(TEXTS, vocab_size=900, model=model, show_progress=False)
        for model in MODELS
    }


@pytest.fixture(params=MODELS)
def tokenizer(request, tokenizers):
    return tokenizers[request.param]


@pytest.fixture(params=EXACT)
def exact_tokenizer(request, tokenizers):
    return tokenizers[request.param]
