"""`generate()` in all its modes against a naive loop that runs the twin over the whole text for every token."""

import functools

import pytest
import torch
from generation_cases import CollectingStreamer, compile_eagerly
from matrix_cases import VOCAB, assert_close, double_weights, loud_model, tiny_config
from peft import LoraConfig, get_peft_model
from reference import reference_greedy, reference_logits
from transformers import (
    ContinuousBatchingConfig,
    DynamicCache,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    StaticCache,
)
from variants import variants

from minillm.cache import CACHE_NAME

NEW = 8
SCHEMES = variants("alibi rope_default-gqa learned none")
VARIANTS = [(attention_type, scheme) for attention_type in ("prefix", "causal") for scheme in SCHEMES]
BACK_ENDS = ("sdpa", "eager")
GREEDY = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}

each_variant = pytest.mark.parametrize(
    ("attention_type", "scheme"), VARIANTS, ids=[f"{attention_type}-{scheme}" for attention_type, scheme in VARIANTS]
)
each_back_end = pytest.mark.parametrize("back_end", BACK_ENDS)


CACHES = {
    "dynamic": {},
    "static": {"cache_implementation": "static"},
    "no_cache": {"use_cache": False},
}


def prompts():
    """Three prompts of unequal length, padded on the left: ids and mask [3, 7]."""
    ids = torch.randint(3, VOCAB, (3, 7), generator=torch.Generator().manual_seed(1))
    mask = torch.tensor([[1] * 7, [0, 0, 0, 1, 1, 1, 1], [0, 1, 1, 1, 1, 1, 1]])
    return ids * mask, mask


def variant_config(attention_type, scheme, **fields):
    return tiny_config(
        attention_type=attention_type, eos_token_id=None, pad_token_id=0, **{**SCHEMES[scheme], **fields}
    )


def build(attention_type, scheme, back_end="sdpa", **fields):
    model = loud_model(variant_config(attention_type, scheme, **fields))
    model.set_attn_implementation(back_end)
    return model


@functools.cache
def expected_answers(attention_type, scheme, as_prefix=True):
    """The naive loop's new tokens [3, NEW] for the padded prompts."""
    model = build(attention_type, scheme)
    ids, mask = prompts()
    prefix = mask if attention_type == "prefix" and as_prefix else None
    with torch.no_grad():
        answers = reference_greedy(model.config, double_weights(model), ids, mask, prefix, max_new_tokens=NEW)
    return torch.tensor(answers)


def test_the_prefix_shows_in_the_answers():
    for scheme in SCHEMES:
        prefix, causal = (expected_answers("prefix", scheme, as_prefix) for as_prefix in (True, False))
        assert not torch.equal(prefix, causal)


@pytest.mark.parametrize("cache", CACHES)
@each_back_end
@each_variant
def test_greedy(attention_type, scheme, back_end, cache):
    model = build(attention_type, scheme, back_end)
    ids, mask = prompts()
    answers = model.generate(ids, attention_mask=mask, **GREEDY, **CACHES[cache])[:, ids.shape[1] :]
    assert torch.equal(answers, expected_answers(attention_type, scheme))


@pytest.mark.mostly_thorough("prefix-alibi-sdpa", "prefix-learned-eager", "causal-rope_default-gqa-sdpa")
@each_back_end
@each_variant
def test_greedy_static_compiled(attention_type, scheme, back_end):
    torch._dynamo.reset()
    model = build(attention_type, scheme, back_end)
    ids, mask = prompts()
    static = {"cache_implementation": "static", "compile_config": compile_eagerly()}
    answers = model.generate(ids, attention_mask=mask, **GREEDY, **static)[:, ids.shape[1] :]
    assert torch.equal(answers, expected_answers(attention_type, scheme))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] >= 1
    assert not torch._dynamo.utils.counters["graph_break"]
    # Another prompt length takes the same graph.
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    model.generate(ids[:, 1:], attention_mask=mask[:, 1:], **GREEDY, **static)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs


@each_variant
def test_one_row_without_a_mask(attention_type, scheme):
    model = build(attention_type, scheme)
    ids, _ = prompts()
    for options in CACHES.values():
        answers = model.generate(ids[:1], **GREEDY, **options)[:, ids.shape[1] :]
        assert torch.equal(answers, expected_answers(attention_type, scheme)[:1])


@pytest.mark.parametrize("cache", CACHES)
@each_variant
def test_inputs_embeds(attention_type, scheme, cache):
    model = build(attention_type, scheme)
    ids, mask = prompts()
    embeddings = model.get_input_embeddings()(ids)
    answers = model.generate(inputs_embeds=embeddings, attention_mask=mask, **GREEDY, **CACHES[cache])
    assert torch.equal(answers, expected_answers(attention_type, scheme))


@each_back_end
@each_variant
def test_beams_agree_over_caches(attention_type, scheme, back_end):
    model = build(attention_type, scheme, back_end)
    ids, mask = prompts()
    beams = {"num_beams": 3, "num_return_sequences": 2, "return_dict_in_generate": True, "output_scores": True}
    outputs = [model.generate(ids, attention_mask=mask, **GREEDY, **beams, **options) for options in CACHES.values()]
    for other in outputs[1:]:
        assert torch.equal(outputs[0].sequences, other.sequences)
    # The score of a beam is the mean log probability of its tokens, which the twin can tell of the text as a whole.
    weights, answers = double_weights(model), outputs[0].sequences[:, ids.shape[1] :]
    for index, answer in enumerate(answers):
        prompt = ids[index // 2][mask[index // 2].bool()]
        text = torch.cat([prompt, answer])[None]
        prefix = (torch.arange(text.shape[1]) < len(prompt)).long()[None] if attention_type == "prefix" else None
        with torch.no_grad():
            logits = reference_logits(model.config, weights, text, prefix_mask=prefix)[0]
        log_probabilities = logits.log_softmax(-1)[len(prompt) - 1 : -1].gather(1, answer[:, None])
        assert outputs[0].sequences_scores[index].item() == pytest.approx(log_probabilities.mean().item(), abs=1e-4)


@pytest.mark.parametrize("mode", ["prompt_lookup", "assisted", "assisted_by_itself"])
@each_variant
def test_candidates(attention_type, scheme, mode):
    """Candidate tokens are checked in one forward with the prompt: the prefix must not reach into them."""
    model = build(attention_type, scheme)
    ids, _ = prompts()
    if mode == "prompt_lookup":
        options = {"prompt_lookup_num_tokens": 3, "max_matching_ngram_size": 1}
    else:
        assistant = loud_model(model.config, seed=1 if mode == "assisted" else 0)
        options = {"assistant_model": assistant}
    answers = model.generate(ids[:1], **GREEDY, **options)[:, ids.shape[1] :]
    assert torch.equal(answers, expected_answers(attention_type, scheme)[:1])


def test_an_assistant_need_not_have_a_prefix():
    model = build("prefix", "rope_default-gqa")
    ids, _ = prompts()
    stock = LlamaForCausalLM(
        LlamaConfig(vocab_size=VOCAB, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    )
    for assistant in (build("causal", "alibi"), stock):
        answers = model.generate(ids[:1], assistant_model=assistant, **GREEDY)[:, ids.shape[1] :]
        assert torch.equal(answers, expected_answers("prefix", "rope_default-gqa")[:1])


@each_variant
def test_a_model_drafts_for_itself_by_leaving_early(attention_type, scheme):
    model = build(attention_type, scheme)
    ids, _ = prompts()
    for _ in range(2):
        answers = model.generate(ids[:1], assistant_early_exit=1, **GREEDY)[:, ids.shape[1] :]
        assert torch.equal(answers, expected_answers(attention_type, scheme)[:1])


@pytest.mark.parametrize(
    ("prefix_mask", "message"),
    [
        (torch.ones(3, 4, dtype=torch.long), r"prefix_mask.*\[3, 4\].*\[3, 7\]"),
        (-torch.ones(3, 7, dtype=torch.long), "prefix_mask.*negative"),
        (torch.ones(3, 7), "prefix_mask.*float32"),
    ],
    ids=["too_short", "negative", "fractions"],
)
def test_a_wrong_prefix_mask_is_refused(prefix_mask, message):
    with pytest.raises(ValueError, match=message):
        build("prefix", "rope_default-gqa").generate(prompts()[0], prefix_mask=prefix_mask, **GREEDY)


def test_guidance_is_refused_where_the_prompt_is_a_prefix():
    ids, _ = prompts()
    options = {"guidance_scale": 1.5, "negative_prompt_ids": ids[1:2, 3:], **GREEDY}
    with pytest.raises(ValueError, match=r"guidance_scale.*prompt_is_prefix"):
        build("prefix", "rope_default-gqa").generate(ids[:1], **options)
    plain, causal = build("prefix", "rope_default-gqa", prompt_is_prefix=False), build("causal", "rope_default-gqa")
    assert torch.equal(plain.generate(ids[:1], **options), causal.generate(ids[:1], **options))


@each_variant
def test_end_token_and_padding_after_it(attention_type, scheme):
    model = build(attention_type, scheme)
    ids, mask = prompts()
    expected = expected_answers(attention_type, scheme)
    end = expected[0, 3].item()
    answers = model.generate(ids, attention_mask=mask, **{**GREEDY, "eos_token_id": end})[:, ids.shape[1] :]
    for row, wanted in zip(answers.tolist(), expected.tolist(), strict=True):
        stop = wanted.index(end) + 1 if end in wanted else len(wanted)
        assert row == (wanted[:stop] + [0] * len(wanted))[: len(row)]
        assert len(row) >= stop


@pytest.mark.parametrize("how", ["config", "argument"])
@each_back_end
@pytest.mark.parametrize("scheme", SCHEMES)
def test_prompt_that_is_no_prefix(scheme, back_end, how):
    model = build("prefix", scheme, back_end, prompt_is_prefix=how != "config")
    ids, mask = prompts()
    options = {"prefix_mask": torch.zeros_like(ids)} if how == "argument" else {}
    answers = model.generate(ids, attention_mask=mask, **GREEDY, **options)[:, ids.shape[1] :]
    assert torch.equal(answers, expected_answers("prefix", scheme, as_prefix=False))


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_prefix_of_choice(scheme, cache):
    """Part of the prompt as prefix, told by an explicit mask."""
    model = build("prefix", scheme)
    ids, mask = prompts()
    prefix = mask * torch.tensor([1] * 5 + [0] * 2)
    with torch.no_grad():
        expected = reference_greedy(model.config, double_weights(model), ids, mask, prefix, max_new_tokens=NEW)
    options = {"prefix_mask": prefix, **CACHES[cache]}
    answers = model.generate(ids, attention_mask=mask, **GREEDY, **options)[:, ids.shape[1] :]
    assert answers.tolist() == expected


def make_cache(kind, model):
    return DynamicCache(config=model.config) if kind == "dynamic" else StaticCache(model.config, max_cache_len=40)


@functools.cache
def second_turn_of(attention_type, scheme):
    """Prompt, answer and second prompt [3, 19], their padding and prefix masks, and the naive loop's second answer."""
    ids, mask = prompts()
    second = torch.randint(3, VOCAB, (3, 4), generator=torch.Generator().manual_seed(2))
    text = torch.cat([ids, expected_answers(attention_type, scheme), second], dim=1)
    whole_mask = torch.nn.functional.pad(mask, (0, NEW + 4), value=1)
    prefix = torch.cat([mask, torch.zeros(3, NEW), torch.ones(3, 4)], dim=1).long()
    model = build(attention_type, scheme)
    blocks = prefix if attention_type == "prefix" else None
    with torch.no_grad():
        expected = reference_greedy(model.config, double_weights(model), text, whole_mask, blocks, max_new_tokens=NEW)
    return text, whole_mask, prefix, expected


@pytest.mark.parametrize("kind", ["dynamic", "static"])
@each_back_end
@each_variant
def test_second_turn(attention_type, scheme, back_end, kind):
    """Prompt, answer, prompt: continuing from the filled cache equals the whole text at once, cached or not."""
    model = build(attention_type, scheme, back_end)
    ids, mask = prompts()
    cache = make_cache(kind, model)
    first = model.generate(ids, attention_mask=mask, **{CACHE_NAME: cache}, **GREEDY)
    text, whole_mask, prefix, expected = second_turn_of(attention_type, scheme)
    assert torch.equal(first, text[:, : first.shape[1]])
    options = {"prefix_mask": prefix} if attention_type == "prefix" else {}
    for caches in ({CACHE_NAME: cache}, {}, {"use_cache": False}, {"cache_implementation": "static"}):
        answers = model.generate(text, attention_mask=whole_mask, **GREEDY, **options, **caches)
        assert answers[:, text.shape[1] :].tolist() == expected


@pytest.mark.parametrize("scheme", SCHEMES)
def test_second_turn_without_a_mask_takes_the_new_tokens_as_prefix(scheme):
    """The last token of the answer is not in the cache yet, so it opens the second block."""
    model = build("prefix", scheme)
    ids, mask = prompts()
    second = torch.randint(3, VOCAB, (3, 4), generator=torch.Generator().manual_seed(2))
    cache = DynamicCache(config=model.config)
    text = torch.cat([model.generate(ids, attention_mask=mask, **{CACHE_NAME: cache}, **GREEDY), second], dim=1)
    whole_mask = torch.cat([mask, torch.ones(3, NEW + 4, dtype=torch.long)], dim=1)
    prefix = torch.cat([mask, torch.zeros(3, NEW - 1), torch.ones(3, 5)], dim=1).long()
    weights = double_weights(model)
    with torch.no_grad():
        expected = reference_greedy(model.config, weights, text, whole_mask, prefix, max_new_tokens=NEW)
    answers = model.generate(text, attention_mask=whole_mask, **{CACHE_NAME: cache}, **GREEDY)
    assert answers[:, text.shape[1] :].tolist() == expected


def test_chunked_prefill_is_refused_with_a_prefix():
    ids, mask = prompts()
    with pytest.raises(ValueError, match="prefill_chunk_size"):
        build("prefix", "rope_default-gqa").generate(ids, attention_mask=mask, prefill_chunk_size=2, **GREEDY)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_chunked_prefill_without_a_prefix(scheme):
    ids, mask = prompts()
    answers = build("causal", scheme).generate(ids, attention_mask=mask, prefill_chunk_size=3, **GREEDY)
    assert torch.equal(answers[:, ids.shape[1] :], expected_answers("causal", scheme))


@each_variant
def test_sampling(attention_type, scheme):
    model = build(attention_type, scheme)
    weights = double_weights(model)
    ids, mask = prompts()
    sampled = {**GREEDY, "do_sample": True, "temperature": 0.7, "top_k": 0, "top_p": 1.0}
    torch.manual_seed(11)
    answers = model.generate(ids, attention_mask=mask, **sampled)[:, ids.shape[1] :]
    torch.manual_seed(11)
    texts = [row[real.bool()].tolist() for row, real in zip(ids, mask, strict=True)]
    lengths = [len(text) for text in texts]
    for _ in range(NEW):
        last = []
        for text, length in zip(texts, lengths, strict=True):
            prefix = torch.tensor([[1] * length + [0] * (len(text) - length)]) if attention_type == "prefix" else None
            with torch.no_grad():
                logits = reference_logits(model.config, weights, torch.tensor([text]), prefix_mask=prefix)
            last.append(logits[0, -1].float())
        drawn = torch.multinomial((torch.stack(last) / 0.7).softmax(-1), num_samples=1)
        for text, token in zip(texts, drawn.flatten().tolist(), strict=True):
            text.append(token)
    assert answers.tolist() == [text[-NEW:] for text in texts]


@each_variant
def test_streamer(attention_type, scheme):
    model = build(attention_type, scheme)
    ids, _ = prompts()
    streamer = CollectingStreamer()
    model.generate(ids[:1], streamer=streamer, **GREEDY)
    assert streamer.ended
    assert streamer.pieces == ids[0].tolist() + expected_answers(attention_type, scheme)[0].tolist()


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("scheme", ["rope_default-gqa", "alibi"])
def test_window(scheme, cache):
    model = build("causal", scheme, sliding_window=3)
    ids, mask = prompts()
    with torch.no_grad():
        expected = reference_greedy(model.config, double_weights(model), ids, mask, max_new_tokens=NEW)
    answers = model.generate(ids, attention_mask=mask, **GREEDY, **CACHES[cache])[:, ids.shape[1] :]
    assert answers.tolist() == expected


def test_runs_past_max_position_embeddings_with_alibi():
    model = build("prefix", "alibi", max_position_embeddings=8)
    ids, mask = prompts()
    answers = model.generate(ids, attention_mask=mask, **GREEDY)[:, ids.shape[1] :]
    assert torch.equal(answers, expected_answers("prefix", "alibi"))


QUANTIZED = {"cache_implementation": "quantized", "cache_config": {"backend": "quanto", "nbits": 4, "q_group_size": 8}}
TELL = {"return_dict_in_generate": True, "output_logits": True}


def test_quantized_cache_equals_llamas():
    """Greedy tokens and logits of the same weights in a stock Llama under the same four-bit cache."""
    model = build("causal", "rope_default-gqa")
    config = model.config
    names = (
        "vocab_size hidden_size num_hidden_layers num_attention_heads num_key_value_heads intermediate_size".split()
    )
    llama = LlamaForCausalLM(
        LlamaConfig(
            **{name: getattr(config, name) for name in names},
            rope_parameters=dict(config.rope_parameters),
            pad_token_id=0,
        )
    ).eval()
    llama.load_state_dict(model.state_dict())
    ids, mask = prompts()
    got, expected = (each.generate(ids, attention_mask=mask, **GREEDY, **QUANTIZED, **TELL) for each in (model, llama))
    assert torch.equal(got.sequences, expected.sequences)
    assert_close(torch.stack(got.logits), torch.stack(expected.logits).double(), "logits")


@each_back_end
@each_variant
def test_quantized_cache(attention_type, scheme, back_end):
    """Four bits are noise on keys and values, but far less than what a lost prefix, position or padding would do."""
    model = build(attention_type, scheme, back_end)
    ids, mask = prompts()
    output = model.generate(ids, attention_mask=mask, **GREEDY, **QUANTIZED, **TELL)
    got, weights, length = torch.stack(output.logits, dim=1), double_weights(model), ids.shape[1]
    whole_mask = torch.nn.functional.pad(mask, (0, NEW), value=1)
    prefix = torch.nn.functional.pad(mask, (0, NEW))
    right = {"attention_mask": whole_mask}
    wrong = [{}] if scheme != "none" else []
    if attention_type == "prefix":
        right["prefix_mask"] = prefix
        wrong.append({"attention_mask": whole_mask})
    with torch.no_grad():
        expected, *others = (
            reference_logits(model.config, weights, output.sequences, **inputs)[:, length - 1 : -1]
            for inputs in (right, *wrong)
        )
    # The first token comes straight from the prompt, before anything is read back from the cache.
    assert_close(got[:, 0], expected[:, 0], "prefill")
    error = (got - expected)[:, 1:].abs().mean()
    for other in others:
        assert error < 0.5 * (other - expected)[1:, 1:].abs().mean()
    assert error < 0.2 * expected.std()


@pytest.mark.gpu
@pytest.mark.parametrize("cache", ["offloaded", "offloaded_static"])
@each_variant
def test_offloaded_cache(attention_type, scheme, cache):
    model = build(attention_type, scheme).cuda()
    ids, mask = (tensor.cuda() for tensor in prompts())
    answers = model.generate(ids, attention_mask=mask, cache_implementation=cache, **GREEDY)[:, ids.shape[1] :]
    assert torch.equal(answers.cpu(), expected_answers(attention_type, scheme))


def unpadded(ids, mask):
    return [row[keep.bool()].tolist() for row, keep in zip(ids, mask, strict=True)]


@pytest.mark.mostly_thorough("rope_default-gqa-sdpa", "learned-eager")
@each_back_end
@pytest.mark.parametrize("scheme", ["rope_default-gqa", "learned", "none"])
def test_continuous_batching(scheme, back_end):
    model = build("causal", scheme, back_end)
    options = GenerationConfig(max_new_tokens=NEW, do_sample=False, eos_token_id=-1, pad_token_id=0)
    # Left to itself the paged cache takes most of the machine's memory.
    small = ContinuousBatchingConfig(num_blocks=16, max_batch_tokens=64)
    outputs = model.generate_batch(
        inputs=unpadded(*prompts()), generation_config=options, continuous_batching_config=small
    )
    answers = [outputs[name].generated_tokens for name in sorted(outputs)]
    assert answers == expected_answers("causal", scheme).tolist()


@pytest.mark.parametrize(
    "fields", [{"attention_type": "prefix"}, {"position_embedding_type": "alibi"}, {"sliding_window": 4}], ids=str
)
def test_continuous_batching_of_what_a_paged_cache_cannot_serve_is_refused(fields):
    model = loud_model(tiny_config(**fields))
    with pytest.raises(ValueError, match="paged cache"):
        model.generate_batch(inputs=[[3, 4, 5]], generation_config=GenerationConfig(max_new_tokens=2))


@pytest.mark.parametrize("options", [{}, {"num_beams": 2}, {"prompt_lookup_num_tokens": 2}], ids=str)
@pytest.mark.parametrize("adapted", [False, True], ids=["plain", "LoRA"])
def test_nothing_deprecated_is_handed_to_forward(adapted, options, recwarn):
    model = loud_model(tiny_config(num_key_value_heads=2))
    model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=2)) if adapted else model
    ids = torch.randint(3, 19, (1, 6), generator=torch.Generator().manual_seed(0))
    model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=3, **options)
    # PEFT uses old names of its own.
    assert not [str(each.message) for each in recwarn if "past_key_values" in str(each.message)]
