"""GLM's inputs, worked by hand, and `generate()` on both position axes against a loop over whole texts."""

import pytest
import torch
from matrix_cases import VOCAB, loud_model, tiny_config
from variants import variants

from minillm.infilling import continue_positions, glm_inputs

MASK, GMASK, SOP = 3, 4, 5
TOKENS = {"mask_token_id": MASK, "gmask_token_id": GMASK, "sop_token_id": SOP}
NEW = 6
SCHEMES = variants("glm_2d-table40 rope_2d rope alibi")


def inputs_of(*rows, attention_mask=None, **options):
    mask = None if attention_mask is None else torch.tensor(attention_mask)
    found = glm_inputs(torch.tensor(rows), [GMASK, MASK], SOP, mask, **options)
    return tuple(tensor.tolist() for tensor in found)


def test_a_blank_inside_the_context():
    positions, blocks, prefix = inputs_of([11, 12, MASK, 13, SOP, 14, 15])
    assert positions == [[0, 1, 2, 3, 2, 2, 2]]
    assert blocks == [[0, 0, 0, 0, 1, 2, 3]]
    assert prefix == [[1, 1, 1, 1, 0, 0, 0]]


def test_a_blank_after_which_positions_count_on():
    positions, blocks, prefix = inputs_of([11, 12, GMASK, SOP, 14], counting_token_ids=[GMASK])
    assert (positions, blocks, prefix) == ([[0, 1, 2, 3, 4]], [[0, 0, 0, 1, 2]], [[1, 1, 1, 0, 0]])


def test_padding_on_the_left_and_after_a_context():
    positions, blocks, prefix = inputs_of(
        [0, 0, 11, GMASK, SOP, 14],
        [11, 12, GMASK, 0, SOP, 14],
        attention_mask=[[0, 0, 1, 1, 1, 1], [1, 1, 1, 0, 1, 1]],
    )
    assert positions == [[0, 0, 0, 1, 1, 1], [0, 1, 2, 3, 2, 2]]
    assert blocks == [[0, 0, 0, 0, 1, 2]] * 2
    assert prefix == [[0, 0, 1, 1, 0, 0], [1, 1, 1, 0, 0, 0]]


@pytest.mark.parametrize("counting", [(), (GMASK,)], ids=["standing", "counting"])
def test_padding_takes_no_place_on_either_axis(counting):
    rows = [[0, 11, GMASK, SOP, 14, 15], [11, GMASK, 0, SOP, 14, 15], [11, GMASK, SOP, 14, 15, 0]]
    masks = [[int(token != 0) for token in row] for row in rows]
    expected = [values[0] for values in inputs_of([11, GMASK, SOP, 14, 15], counting_token_ids=counting)]
    found = inputs_of(*rows, attention_mask=masks, counting_token_ids=counting)
    for values, alone in zip(found, expected, strict=True):
        for row, mask in zip(values, masks, strict=True):
            assert [value for value, real in zip(row, mask, strict=True) if real] == alone


def test_generate_counts_on_over_padding_behind_a_context():
    config = tiny_config(attention_type="prefix", **TOKENS, eos_token_id=None, pad_token_id=0)
    model, options = loud_model(config), {"max_new_tokens": NEW, "do_sample": False}
    ids, mask = prompts()
    alone = model.generate(ids[1:, 3:], **options)[0, -NEW:]
    padded = torch.cat((ids[1:, 3:-1], torch.zeros(1, 3, dtype=torch.long), ids[1:, -1:]), dim=-1)
    mask = (padded != 0).long()
    assert torch.equal(model.generate(padded, attention_mask=mask, **options)[0, -NEW:], alone)


def test_the_blank_named_first_is_filled_at_its_first_place():
    assert inputs_of([MASK, GMASK, 11, GMASK, SOP])[0] == [[0, 1, 2, 3, 1]]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ([11, GMASK, 12], "row 1 holds no start token"),
        ([11, SOP, GMASK], "row 1 has no blank"),
        ([0, SOP, 1], "row 1"),
    ],
)
def test_what_is_no_glm_input_is_refused(row, message):
    with pytest.raises(ValueError, match=message):
        inputs_of([11, GMASK, SOP], row)


def test_positions_go_on_as_they_did():
    first, second = continue_positions(torch.tensor([[0, 1, 1], [0, 1, 2]]), torch.tensor([[0, 0, 1], [0, 0, 0]]), 5)
    assert first.tolist() == [[0, 1, 1, 1, 1], [0, 1, 2, 3, 4]]
    assert second.tolist() == [[0, 0, 1, 2, 3], [0, 0, 0, 0, 0]]


def prompts():
    """Contexts of unequal length, the shorter padded on the left, each with a blank and the start token."""
    ids = torch.randint(6, VOCAB, (2, 8), generator=torch.Generator().manual_seed(0))
    ids[:, -1], ids[0, 2], ids[1, 6] = SOP, MASK, GMASK
    mask = torch.tensor([[1] * 8, [0] * 3 + [1] * 5])
    return ids * mask, mask


def naive(model, ids, mask, counting=()):
    """The best next token of the whole text, again and again, without a cache."""
    for _ in range(NEW):
        with torch.no_grad():
            inputs = glm_inputs(ids, [GMASK, MASK], SOP, mask, counting)
            logits = model(ids, attention_mask=mask, use_cache=False, **inputs._asdict()).logits
        ids = torch.cat([ids, logits[:, -1:].argmax(-1)], dim=-1)
        mask = torch.nn.functional.pad(mask, (0, 1), value=1)
    return ids


@pytest.mark.parametrize("cache", [{}, {"use_cache": False}, {"cache_implementation": "static"}], ids=str)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_generate_finds_prefix_and_positions_by_itself(scheme, cache):
    config = tiny_config(attention_type="prefix", **SCHEMES[scheme], **TOKENS, eos_token_id=None, pad_token_id=0)
    model, (ids, mask) = loud_model(config), prompts()
    counting = () if "2d" in scheme else (GMASK,)
    expected = naive(model, ids, mask, counting)
    options = {"attention_mask": mask, "max_new_tokens": NEW, "do_sample": False, **cache}
    assert torch.equal(model.generate(ids, **options), expected)
    given = glm_inputs(ids, [GMASK, MASK], SOP, mask, counting)._asdict()
    assert torch.equal(model.generate(ids, **options, **given), expected)


@pytest.mark.parametrize("scheme", ["glm_2d-table40", "rope_2d"])
def test_beams_and_candidates_keep_both_axes(scheme):
    config = tiny_config(attention_type="prefix", **SCHEMES[scheme], **TOKENS, eos_token_id=None, pad_token_id=0)
    model, (ids, mask) = loud_model(config), prompts()
    options = {"attention_mask": mask, "max_new_tokens": NEW, "do_sample": False}
    cached = model.generate(ids, num_beams=3, **options)
    assert torch.equal(cached, model.generate(ids, num_beams=3, use_cache=False, **options))
    row = {**options, "attention_mask": mask[:1]}
    looked_up = model.generate(ids[:1], prompt_lookup_num_tokens=2, max_matching_ngram_size=1, **row)
    assert torch.equal(looked_up, naive(model, ids, mask)[:1])
    with pytest.raises(ValueError, match=r"block_position_ids.*assistant"):
        model.generate(ids[:1], assistant_model=loud_model(config), **row)


def test_the_start_token_matters_to_configs_that_name_it():
    model = loud_model(tiny_config(attention_type="prefix", eos_token_id=None, pad_token_id=0))
    ids, mask = prompts()
    options = {"attention_mask": mask, "max_new_tokens": NEW, "do_sample": False}
    plain = model.generate(ids, **options)
    model.config.mask_token_id, model.config.gmask_token_id, model.config.sop_token_id = MASK, GMASK, SOP
    assert not torch.equal(model.generate(ids, **options), plain)
    with pytest.raises(ValueError, match="row 1 has no blank"):
        model.generate(ids.where(ids != GMASK, 7), **options)
