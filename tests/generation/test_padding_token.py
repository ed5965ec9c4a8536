"""Padding is what the mask says: a token that pads may have a meaning of its own, as where it is the end token."""

import pytest
import torch
from matrix_cases import LENGTH, VOCAB
from transformers import GPT2Config, GPT2LMHeadModel
from variant_cases import VARIANTS, config_of, inputs_of, model_of, tokens

from minillm import MiniLLMForCausalLM, MiniLLMForSequenceClassification
from minillm.conversion import convert

END = 0


def with_ends(ids):
    """Texts with the padding token in their middle and at their end."""
    ids = ids.clone()
    ids[:, 4] = ids[:, -1] = END
    return ids


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_padding_token_learns_where_it_is_real(variant):
    """Its row of the embedding gets the gradient that it gets in a model without a padding token."""
    ids = with_ends(tokens())
    gradients = []
    for pad in (END, None):
        model = model_of(variant, pad_token_id=pad)
        inputs = {**inputs_of(model.config), "input_ids": ids}
        model(**inputs, attention_mask=torch.ones_like(ids), labels=ids).loss.backward()
        gradients.append(model.get_input_embeddings().weight.grad)
    assert torch.equal(*gradients) and gradients[0][END].abs().max() > 1e-4


@pytest.mark.parametrize("variant", VARIANTS)
def test_padding_gives_no_gradient(variant):
    """Where it pads, the mask keeps it from the loss, so that nothing has to be taken away."""
    model = model_of(variant)
    ids, mask = tokens().clamp(min=3), (torch.arange(LENGTH) < 7).long().expand(2, -1)
    ids = ids.masked_fill(mask == 0, END)
    inputs = {**inputs_of(model.config), "input_ids": ids}
    labels = ids.masked_fill(mask == 0, -100)
    model(**inputs, attention_mask=mask, labels=labels).loss.backward()
    assert model.get_input_embeddings().weight.grad[END].abs().max() == 0


@pytest.mark.parametrize("variant", VARIANTS)
def test_its_row_is_initialised_as_any_other(variant):
    torch.manual_seed(0)
    weight = MiniLLMForCausalLM(config_of(variant, pad_token_id=END, hidden_size=256)).get_input_embeddings().weight
    assert weight[END].detach().std() == pytest.approx(config_of(variant).initializer_range, rel=0.2)


def test_gradients_equal_gpt2s_own(tmp_path):
    torch.manual_seed(0)
    sizes = {"vocab_size": VOCAB, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 32}
    native = GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=END, eos_token_id=END, pad_token_id=END)).eval()
    native.save_pretrained(tmp_path / "gpt2")
    convert(tmp_path / "gpt2", tmp_path / "ours", with_tokenizer=False)
    ours = MiniLLMForCausalLM.from_pretrained(tmp_path / "ours").eval()
    assert ours.config.pad_token_id == END
    ids = with_ends(tokens())
    for model in (native, ours):
        model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids).loss.backward()
    got, expected = (model.get_input_embeddings().weight.grad for model in (ours, native))
    torch.testing.assert_close(got, expected, atol=1e-6, rtol=1e-5)


def scored_at(model, inputs, index):
    """The scores of a text at a token, from the states of the base model."""
    with torch.no_grad():
        states = model.model(**inputs).last_hidden_state
        return model.score(states[torch.arange(len(index)), index])


@pytest.mark.parametrize("embeds", [False, True])
@pytest.mark.parametrize("pad", [END, None])
@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_class_is_read_at_the_last_token_of_the_mask(variant, side, pad, embeds):
    model = model_of(variant, MiniLLMForSequenceClassification, pad_token_id=pad, num_labels=3)
    ids = with_ends(tokens())
    mask = (
        torch.tensor([[1] * 7 + [0] * 3, [1] * 10]) if side == "right" else torch.tensor([[0] * 3 + [1] * 7, [1] * 10])
    )
    ids[:, 6] = END
    last = [6, 9] if side == "right" else [9, 9]
    inputs = {**inputs_of(model.config), "input_ids": ids, "attention_mask": mask}
    if embeds:
        inputs["inputs_embeds"] = model.get_input_embeddings()(inputs.pop("input_ids")).detach()
    with torch.no_grad():
        torch.testing.assert_close(model(**inputs).logits, scored_at(model, inputs, last))


def test_without_a_mask_the_padding_token_says_where_a_text_ends():
    model = model_of("causal", MiniLLMForSequenceClassification, num_labels=3)
    ids = tokens().clamp(min=3)
    ids[0, 7:] = END
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, scored_at(model, {"input_ids": ids}, [6, 9]))
        embeds = {"inputs_embeds": model.get_input_embeddings()(ids)}
        torch.testing.assert_close(model(**embeds).logits, scored_at(model, embeds, [9, 9]))
    without = model_of("causal", MiniLLMForSequenceClassification, pad_token_id=None, num_labels=3)
    with pytest.raises(ValueError, match="attention_mask"):
        without(ids)
    assert without(ids[:1]).logits.shape == (1, 3)
