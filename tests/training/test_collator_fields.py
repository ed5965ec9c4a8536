"""Fields of collators and objectives that are assigned, or left out, where something needs them."""

import numpy as np
import pytest

from minillm.training import DataCollatorForCausalLM
from minillm.training.objective_blanks import FilledBlanks


@pytest.mark.parametrize(("field", "value"), [("packing", True), ("padding", "max_length")])
def test_a_field_that_needs_max_length_is_refused_when_it_is_assigned_too(field, value):
    collator = DataCollatorForCausalLM(pad_token_id=0, packing=False)
    samples = [{"input_ids": [1, 2, 3]}]
    assert collator(samples)["input_ids"].tolist() == [[1, 2, 3]]
    setattr(collator, field, value)
    with pytest.raises(ValueError, match="need `max_length`"):
        collator(samples)


def test_sentences_need_something_that_finds_their_ends():
    settings = {
        "mask_fraction": 0.15,
        "mean_span_length": 3.0,
        "document_fraction": (0.5, 1.0),
        "gmask_counts": False,
        "token_ids": {},
        "special": np.zeros(9, bool),
        "find_ends": None,
    }
    FilledBlanks(mixture={"token": 1.0}, **settings)
    with pytest.raises(ValueError, match="find_ends"):
        FilledBlanks(mixture={"sentence": 1.0}, **settings)
