"""One graph for batches of any size: compiled once, equal to eager on a second shape."""

import pytest
import torch
from variant_cases import VARIANTS, inputs_of, model_of


def padded(config, batch, length):
    mask = torch.ones(batch, length, dtype=torch.long)
    mask[0, 0] = 0
    return {**inputs_of(config, batch=batch, length=length), "attention_mask": mask}


def packed(config, batch, length):
    documents = (torch.arange(length) > 3).long().expand(batch, -1)
    inputs = inputs_of(config, batch=batch, length=length)
    inputs.pop("block_position_ids", None)
    return {**inputs, "document_ids": documents}


QUICK = [("causal_rope", padded), ("prefix_alibi", packed)]
CASES = [(variant, kind) for variant in VARIANTS for kind in (padded, packed)]


@pytest.mark.parametrize(
    ("variant", "kind"),
    [pytest.param(*case, marks=[] if case in QUICK else [pytest.mark.slow]) for case in CASES],
    ids=lambda part: part if isinstance(part, str) else part.__name__,
)
@torch.no_grad()
def test_a_graph_of_any_shape_equals_eager(variant, kind):
    model = model_of(variant)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True, dynamic=True)
    for batch, length in ((2, 6), (3, 9)):
        inputs = kind(model.config, batch, length)
        real = inputs.get("attention_mask", torch.ones(batch, length)).bool()
        expected = model(**inputs, use_cache=False).logits[real]
        got = compiled(**inputs, use_cache=False).logits[real]
        torch.testing.assert_close(got, expected, atol=1e-5 * expected.abs().max().item(), rtol=0)
    torch.compiler.reset()
