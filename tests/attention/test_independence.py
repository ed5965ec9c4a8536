"""What a model computes for a text depends on that text alone: not on earlier calls, nor on what stands beside it."""

import copy

import pytest
import torch
from matrix_cases import LENGTH, VOCAB, assert_close, double_weights, loud_model, rows, tiny_config
from reference import reference_logits
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding
from variant_cases import GENERATIVE, VARIANTS, inputs_of, model_of, tokens
from variants import variants

import minillm.token_facts
from minillm import MiniLLMConfig
from minillm.rotary import MiniLLMRotaryEmbedding

BY_LENGTH = variants("rope_dynamic rope_longrope")
MODELS = {
    **{variant: (lambda variant=variant: model_of(variant)) for variant in VARIANTS},
    **{name: (lambda name=name: model_of(name)) for name in [*BY_LENGTH, "rope_partial_dynamic"]},
}


def long_inputs(config):
    """A text three times as long, as far as a table of positions allows."""
    return inputs_of(config, batch=1, length=3 * LENGTH, seed=9)


def short_call(model):
    inputs = inputs_of(model.config, batch=1, length=4)
    with torch.no_grad():
        return model(**inputs).logits


@pytest.mark.parametrize("name", MODELS)
def test_no_output_depends_on_an_earlier_call(name):
    model = MODELS[name]()
    expected = short_call(model)
    inputs = long_inputs(model.config)
    longer = model(**inputs, labels=inputs["input_ids"])
    assert torch.equal(short_call(model), expected), "after a longer text"
    longer.loss.backward()
    model.zero_grad()
    model.train()(**inputs)
    model.eval()
    assert torch.equal(short_call(model), expected), "after training"
    packed = {name: value for name, value in inputs.items() if name == "input_ids"}
    model(**packed, document_ids=(torch.arange(3 * LENGTH) > 7).long()[None])
    assert torch.equal(short_call(model), expected), "after packed documents"
    if model.config.attention_type != "bidirectional":
        model.generate(inputs["input_ids"][:, :6], max_new_tokens=8, do_sample=False, pad_token_id=0)
        model.generate(inputs["input_ids"][:, :6], max_new_tokens=8, cache_implementation="static", pad_token_id=0)
        assert torch.equal(short_call(model), expected), "after generation"
    compiled = torch.compile(model, backend="eager")
    with torch.no_grad():
        compiled(**inputs)
    torch.compiler.reset()
    assert torch.equal(short_call(model), expected), "after a compiled call"


@pytest.mark.parametrize("name", [name for name in MODELS if name not in VARIANTS or name in GENERATIVE])
def test_generation_does_not_depend_on_an_earlier_call(name):
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    prompt = tokens(batch=1, length=3)
    fresh = MODELS[name]().generate(prompt, **options)
    model = MODELS[name]()
    model.generate(tokens(batch=2, length=20), **options)
    assert torch.equal(model.generate(prompt, **options), fresh)


@pytest.mark.parametrize("back_end", ["eager", "sdpa"])
@pytest.mark.parametrize("name", BY_LENGTH)
@torch.no_grad()
def test_a_short_document_beside_a_long_one(name, back_end):
    """Packed by numbers, packed by positions, and in a padded batch: each as the document alone, and as the twin."""
    model = loud_model(tiny_config(**BY_LENGTH[name]))
    model.set_attn_implementation(back_end)
    ids = tokens(batch=1, length=14)
    alone = torch.cat([model(ids[:, :4]).logits, model(ids[:, 4:]).logits], dim=1)
    positions = torch.cat([torch.arange(4), torch.arange(10)])[None]
    documents = rows("00001111111111")
    assert_close(model(ids, document_ids=documents).logits, alone.double(), "numbers")
    assert_close(model(ids, position_ids=positions).logits, alone.double(), "positions")
    assert_close(alone, reference_logits(model.config, double_weights(model), ids, document_ids=documents), "twin")
    for mask, short in ((rows("1111000000", "1111111111"), slice(0, 4)), (rows("0000001111", "1" * 10), slice(6, 10))):
        batch = torch.cat([torch.zeros(1, 10, dtype=torch.long), ids[:, 4:]])
        batch[0, short] = ids[0, :4]
        logits = model(batch, attention_mask=mask).logits
        assert_close(logits[:1, short], alone[:, :4].double(), "short row of a padded batch")
        assert_close(logits[1:], alone[:, 4:].double(), "long row of a padded batch")


@pytest.mark.parametrize("cache", [{}, {"cache_implementation": "static"}], ids=["dynamic", "static"])
@pytest.mark.parametrize("name", BY_LENGTH)
def test_generation_beyond_the_original_length_equals_llamas(name, cache):
    """Greedy text and logits of a single row, which is what Llama's rule, the longest of the batch, says of one."""
    config = tiny_config(**BY_LENGTH[name])
    model = loud_model(config)
    sizes = "vocab_size hidden_size num_hidden_layers num_attention_heads intermediate_size max_position_embeddings"
    llama = LlamaForCausalLM(
        LlamaConfig(
            **{size: getattr(config, size) for size in sizes.split()},
            rope_parameters=dict(config.rope_parameters),
        )
    ).eval()
    llama.load_state_dict(model.state_dict())
    options = {"max_new_tokens": 9, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    for length in (3, 7):
        ids = torch.randint(0, VOCAB, (1, length), generator=torch.Generator().manual_seed(length))
        got, expected = (each.generate(ids, pad_token_id=0, **options, **cache) for each in (model, llama))
        assert torch.equal(got.sequences, expected.sequences)
        assert_close(torch.stack(got.logits), torch.stack(expected.logits).double(), f"prompt of {length}")


@pytest.mark.parametrize("name", BY_LENGTH)
@torch.no_grad()
def test_cached_keys_count_towards_the_length(name):
    """Rows of one batch that are decoded together: each follows its own length, padding and cached tokens included."""
    model = loud_model(tiny_config(**BY_LENGTH[name]))
    ids, mask = tokens(batch=2, length=9), rows("000000111", "111111111")
    both, alone, cache, own = [], [], DynamicCache(), DynamicCache()
    for start, end in ((0, 7), (7, 8), (8, 9)):
        both.append(model(ids[:, start:end], attention_mask=mask[:, :end], past_key_values=cache).logits)
    for start, end in ((6, 7), (7, 8), (8, 9)):
        alone.append(model(ids[:1, start:end], past_key_values=own).logits)
    assert_close(torch.cat(both, 1)[:1, 6:], torch.cat(alone, 1).double(), "the short row")
    far = torch.cat([model(ids[1:, start:end], past_key_values=cache).logits for cache, start, end in one_by_one()], 1)
    assert_close(torch.cat(both, 1)[1:, 7:], far.double()[:, 7:], "the long row")


def one_by_one():
    cache = DynamicCache()
    return [(cache, 0, 7), (cache, 7, 8), (cache, 8, 9)]


# --- what is read out of positions ---

ZEROS = torch.tensor([[0, 1, 2, 3, 0, 0, 0, 0]])


@pytest.fixture
def warnings_of(monkeypatch):
    told = []
    monkeypatch.setattr(minillm.token_facts.logger, "warning_once", lambda message: told.append(message))

    def run(model, **inputs):
        told.clear()
        with torch.no_grad():
            logits = model(tokens(batch=1, length=8), **inputs).logits
        return logits, list(told)

    return run


@pytest.mark.parametrize("use_cache", [False, True])
def test_a_run_of_zeros_is_documents_of_one_token_and_said_once(warnings_of, use_cache):
    model = loud_model(tiny_config())
    logits, told = warnings_of(model, position_ids=ZEROS, use_cache=use_cache)
    assert len(told) == 1 and "run of zeros" in told[0]
    documents, _ = warnings_of(model, position_ids=ZEROS, document_ids=torch.tensor([[0, 0, 0, 0, 1, 2, 3, 4]]))
    assert_close(logits, documents.double(), "five documents")


def test_what_says_what_zeros_mean_is_not_warned_of(warnings_of):
    model = loud_model(tiny_config())
    real = torch.tensor([[1, 1, 1, 1, 0, 0, 0, 0]])
    alone = warnings_of(model)[0][:, :4]
    for inputs in ({"attention_mask": real}, {"document_ids": torch.zeros_like(ZEROS)}):
        logits, told = warnings_of(model, position_ids=ZEROS, **inputs)
        assert not told
        assert_close(logits[:, :4], alone.double(), str(inputs))
    assert not warnings_of(model, position_ids=torch.tensor([[0, 1, 2, 0, 1, 0, 1, 2]]))[1]


@pytest.mark.parametrize("length", [4, 40])
@pytest.mark.parametrize("name", BY_LENGTH)
def test_a_rotary_embedding_by_itself_takes_a_row_for_a_document_as_llamas_does(name, length):
    sizes = {"hidden_size": 32, "num_attention_heads": 4}
    rotary = MiniLLMRotaryEmbedding(MiniLLMConfig(**sizes, **copy.deepcopy(BY_LENGTH[name])), "cpu")
    llama = LlamaRotaryEmbedding(LlamaConfig(**sizes, **copy.deepcopy(BY_LENGTH[name])))
    found, expected = (module(torch.zeros(()), torch.arange(length)[None]) for module in (rotary, llama))
    torch.testing.assert_close(found[0], expected[0])
    # MiniLLM's sines have the sign that rotates.
    torch.testing.assert_close(found[1].abs(), expected[1].abs())
