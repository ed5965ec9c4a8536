"""`fill` against a loop without cache or padding, in all schemes, caches and ways to decode."""

import json
from pathlib import Path

import pytest
import torch
from fill_cases import (
    EOP,
    EOS,
    GMASK,
    MASK,
    NAMES,
    NEW,
    PAD,
    SCHEMES,
    SMASK,
    SOP,
    STOPS,
    TEXTS,
    WordTokenizer,
    beam_span,
    context_of,
    fill_model,
    naive_fill,
    next_log_probabilities,
)
from generation_cases import CollectingStreamer, compile_eagerly
from matrix_cases import VOCAB, loud_model, tiny_config
from safetensors.torch import load_file
from transformers import GenerationConfig

from minillm.conversion import load
from minillm.infilling import continue_positions, glm_inputs
from minillm.tokenization.glm_layout import lay_out_row

FAMILIES = Path(__file__).parents[1] / "families"
GREEDY = {"max_new_tokens": NEW, "do_sample": False}
CACHES = {"dynamic": {}, "static": {"cache_implementation": "static"}, "no_cache": {"use_cache": False}}

each_scheme = pytest.mark.parametrize("scheme", SCHEMES)
each_cache = pytest.mark.parametrize("cache", CACHES)


def fill_ids(model, texts=TEXTS, **options):
    return model.fill(texts, WordTokenizer(), **{**GREEDY, **options}).fill_ids


@each_cache
@each_scheme
def test_greedy(scheme, cache):
    model = fill_model(scheme)
    expected = [naive_fill(model, text) for text in TEXTS]
    assert fill_ids(model, **CACHES[cache]) == expected
    lengths = {len(span) for spans in expected for span in spans}
    assert NEW in lengths and len(lengths) > 3 and min(lengths) < 2


@each_scheme
def test_a_text_in_a_batch_is_filled_as_alone(scheme):
    model = fill_model(scheme)
    assert fill_ids(model) == [fill_ids(model, text)[0] for text in TEXTS]


@each_cache
@each_scheme
def test_beams(scheme, cache):
    model = fill_model(scheme)
    expected = [naive_fill(model, text, search=beam_span) for text in TEXTS[:3]]
    assert fill_ids(model, TEXTS[:3], num_beams=3, min_new_tokens=NEW, **CACHES[cache]) == expected
    assert expected != [naive_fill(model, text) for text in TEXTS[:3]]


@each_scheme
def test_beams_wide_enough_find_the_best_fill_of_all(scheme):
    """All fills of up to two tokens, the end included, by log probability for each token."""
    model = fill_model(scheme)
    for text in (TEXTS[0], TEXTS[3]):
        context, (blank,) = context_of(text)
        first = next_log_probabilities(model, context, [(blank, [])])
        scores = {(stop,): first[stop].item() for stop in STOPS}
        for token in set(range(VOCAB)) - set(STOPS):
            second = next_log_probabilities(model, context, [(blank, [token])])
            scores |= {(token, other): (first[token] + second[other]).item() / 2 for other in range(VOCAB)}
        best = [token for token in max(scores, key=scores.get) if token not in STOPS]
        assert fill_ids(model, text, num_beams=VOCAB, max_new_tokens=2) == [[best]]


@each_scheme
def test_orders(scheme):
    model = fill_model(scheme)
    two = TEXTS[1]
    assert fill_ids(model, two, order=[1, 0]) == [naive_fill(model, two, [1, 0])]
    orders = [[0], [1, 0], [2, 0, 1], [0]]
    expected = [naive_fill(model, text, order) for text, order in zip(TEXTS, orders, strict=True)]
    assert fill_ids(model, order=orders) == expected
    assert expected != [naive_fill(model, text) for text in TEXTS]


@each_scheme
def test_sampled(scheme):
    model = fill_model(scheme)
    torch.manual_seed(5)
    found = fill_ids(model, do_sample=True, temperature=0.7, top_k=0)
    torch.manual_seed(5)
    contexts = [context_of(text) for text in TEXTS]
    done = [[] for _ in TEXTS]
    for turn in range(3):
        active = [number for number, (_, blanks) in enumerate(contexts) if turn < len(blanks)]
        spans = {number: [] for number in active}
        while any(len(span) < NEW and not set(span) & set(STOPS) for span in spans.values()):
            last = [
                next_log_probabilities(model, contexts[number][0], [*done[number], (contexts[number][1][turn], span)])
                for number, span in spans.items()
            ]
            drawn = torch.multinomial((torch.stack(last) / 0.7).softmax(-1), num_samples=1).flatten().tolist()
            for number, token in zip(active, drawn, strict=True):
                spans[number].append(token)
        for number, span in spans.items():
            end = next((at for at, token in enumerate(span) if token in STOPS), NEW)
            done[number].append((contexts[number][1][turn], span[:end]))
    assert found == [[span for _, span in spans] for spans in done]


@pytest.mark.mostly_thorough("glm_2d-table40")
@each_scheme
def test_compiled_decoding_steps(scheme):
    torch._dynamo.reset()
    model = fill_model(scheme)
    static = {"cache_implementation": "static", "compile_config": compile_eagerly()}
    assert fill_ids(model, TEXTS[:2], **static) == [naive_fill(model, text) for text in TEXTS[:2]]
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] >= 1
    assert not torch._dynamo.utils.counters["graph_break"]


@each_scheme
def test_rows_that_are_done_are_not_decoded(scheme, monkeypatch):
    model, sizes = fill_model(scheme), []
    generate = model.generate

    def watched(input_ids, **options):
        sizes.append(input_ids.shape)
        return generate(input_ids=input_ids, **options)

    monkeypatch.setattr(model, "generate", watched)
    found = fill_ids(model)
    assert [batch for batch, _ in sizes] == [4, 2, 1]
    assert sizes[2][1] == 8 + len(found[2][0]) + len(found[2][1]) + 3 - 1


def test_filled_texts_and_names():
    filled = fill_model("glm_2d-table40").fill(TEXTS, WordTokenizer(), **GREEDY)
    for text, words, ids, own in zip(filled.texts, filled.fills, filled.fill_ids, TEXTS, strict=True):
        assert words == [WordTokenizer().decode(span, skip_special_tokens=True) for span in ids]
        names = [name for name in own.replace("]", "[").split("[") if "MASK" in name]
        for name, word in zip(names, words, strict=True):
            own = own.replace(f"[{name}]", word, 1)
        assert text == own


def test_generation_settings_come_from_config_or_call():
    model = fill_model("rope_2d")
    long = naive_fill(model, TEXTS[0])[0]
    assert len(long) == NEW
    short = GenerationConfig(max_new_tokens=2, do_sample=False, pad_token_id=PAD)
    assert model.fill(TEXTS[0], WordTokenizer(), generation_config=short).fill_ids == [[long[:2]]]
    # A further token that ends.
    assert fill_ids(model, TEXTS[0], eos_token_id=long[1]) == [[long[:1]]]
    model.generation_config.max_new_tokens = 3
    assert model.fill(TEXTS[0], WordTokenizer(), do_sample=False).fill_ids == [[long[:3]]]
    outputs = {"return_dict_in_generate": True, "output_scores": True}
    assert fill_ids(model, TEXTS[0], **outputs) == [[long]]


def test_tokens_of_the_config_stand_in_for_those_a_tokenizer_lacks():
    class Bare(WordTokenizer):
        sop_token_id = mask_token_id = smask_token_id = gmask_token_id = eop_token_id = None

    model = fill_model("glm_2d-table40")
    with pytest.raises(ValueError, match=r"names a blank \(`mask_token_id`, ...\)"):
        model.fill(TEXTS[0], Bare())
    model.config.mask_token_id = MASK
    with pytest.raises(ValueError, match="names `sop_token_id`"):
        model.fill(TEXTS[0], Bare())
    model.config.sop_token_id = SOP
    found = model.fill(TEXTS[0], Bare(), **GREEDY).fill_ids[0][0]
    expected = naive_fill(model, TEXTS[0])[0]
    assert found[: len(expected)] == expected


def test_blanks_that_are_written_but_not_read_are_refused():
    class Blind(WordTokenizer):
        def __call__(self, texts, **options):
            return {"input_ids": [[MASK, 7] for _ in texts]}

    with pytest.raises(ValueError, match=r"reads 1 blanks in 'w7 .*', which writes 2"):
        fill_model("glm_2d-table40").fill("w7 [MASK] w8 [MASK]", Blind())


@pytest.mark.gpu
@each_cache
@each_scheme
def test_on_a_gpu(scheme, cache):
    """A static cache has its decoding steps compiled there by itself."""
    model = fill_model(scheme)
    expected = [naive_fill(model, text) for text in TEXTS]
    assert fill_ids(model.cuda(), **CACHES[cache]) == expected


REFUSED = {
    "no blank": (["w7 [MASK]", "w8 w9"], {}, r"text 1 holds no blank \(\[MASK\], \[gMASK\], \[sMASK\]\): 'w8 w9'"),
    "no text": ([], {}, "no text"),
    "order of one": (TEXTS[1], {"order": [0]}, r"`order` \[0\] of text 0 is no order of its 2 blanks"),
    "order twice": (TEXTS[1], {"order": [1, 1]}, r"`order` \[1, 1\] of text 0"),
    "orders missing": (TEXTS[:2], {"order": [[0]]}, "`order` holds those of 1 texts; 2"),
    "several": (TEXTS[0], {"num_return_sequences": 2, "num_beams": 2}, "num_return_sequences"),
    "several by config": (
        TEXTS[0],
        {"generation_config": GenerationConfig(num_return_sequences=2, do_sample=True)},
        "filled once",
    ),
    "max_length": (TEXTS[0], {"max_length": 20}, "give `max_new_tokens`"),
    "new tokens": (TEXTS[0], {"max_new_tokens": 40}, r"text 0 needs `block_position_ids` up to 40.*size=40"),
    "long text": (["w7 [MASK]", f"{'w8 ' * 40} [MASK]"], {}, r"text 1 needs `position_ids` up to 40.*size=40"),
}


@pytest.mark.parametrize(("texts", "options", "message"), REFUSED.values(), ids=REFUSED)
def test_what_is_refused(texts, options, message):
    with pytest.raises(ValueError, match=message):
        fill_model("glm_2d-table40").fill(texts, WordTokenizer(), **{"max_new_tokens": 4, **options})


def test_as_many_tokens_as_the_table_holds():
    """The last token goes in on no position; 39 have the places 1 (the start) to 39."""
    assert len(fill_ids(fill_model("glm_2d-table40"), TEXTS[0], max_new_tokens=39, min_new_tokens=39)[0][0]) == 39
    texts = ["w7 " * 29 + "[gMASK]", "w7 [MASK]"]
    learned = loud_model(tiny_config(attention_type="prefix", position_embedding_type="learned", pad_token_id=PAD))
    learned.fill(texts, WordTokenizer(), max_new_tokens=2, min_new_tokens=2)
    with pytest.raises(ValueError, match=r"text 0 needs `position_ids` up to 32.*size=32"):
        learned.fill(texts, WordTokenizer(), max_new_tokens=3)


@pytest.mark.parametrize("method", ["fill", "score_fills"])
@pytest.mark.parametrize("attention_type", ["causal", "bidirectional"])
def test_only_prefix_models_have_blanks(attention_type, method):
    arguments = [TEXTS[0], WordTokenizer()] if method == "fill" else [TEXTS[0], ["w7"], WordTokenizer()]
    with pytest.raises(ValueError, match=rf"{method}\(\) with `attention_type='{attention_type}'`"):
        getattr(loud_model(tiny_config(attention_type=attention_type)), method)(*arguments)


class NumberTokenizer(WordTokenizer):
    """The numbers of a family's tokens, with names for its own special ones."""

    def __init__(self, size, facts):
        super().__init__(size)
        self.words = [f"w{number}" for number in range(size)]
        special = {"[MASK]": "mask_token_id", "[gMASK]": "gmask_token_id"}
        self.mask_token_id, self.gmask_token_id = (facts[name] for name in special.values())
        self.words[self.mask_token_id], self.words[self.gmask_token_id] = special
        self.smask_token_id = self.pad_token_id = None
        self.sop_token_id = facts.get("start_token_id", facts.get("bos_token_id"))
        self.eop_token_id = self.eos_token_id = facts.get("end_token_id", facts.get("eos_token_id"))


@pytest.mark.parametrize(
    ("name", "of"), [("glm-10b", "greedy_mask"), ("glm-10b", "greedy_gmask"), ("chatglm-6b", "mask")]
)
def test_families_fill_as_their_own_code_does(name, of):
    model = load(FAMILIES / name).eval()
    tensors = load_file(FAMILIES / name / "cases.safetensors")
    facts = json.loads((FAMILIES / name / "cases.json").read_text("utf-8"))
    tokenizer = NumberTokenizer(model.config.vocab_size, facts)
    if name == "glm-10b":
        context, generated = tensors[f"{of}.context"][0].tolist(), tensors[f"{of}.generated"][0].tolist()
    else:
        length = facts["cases"][of]["prompt_length"]
        greedy = tensors[f"{of}.greedy"][0].tolist()
        context, generated = greedy[:length], greedy[length + 1 :]
    text = " ".join(tokenizer.convert_ids_to_tokens(context))
    blanks = sum(token_id in (tokenizer.mask_token_id, tokenizer.gmask_token_id) for token_id in context)
    assert blanks == 1
    stop = generated.index(tokenizer.eop_token_id) if tokenizer.eop_token_id in generated else len(generated)
    found = model.fill(text, tokenizer, max_new_tokens=len(generated), do_sample=False).fill_ids
    assert found == [[generated[:stop]]]


def test_positions_go_on_behind_another_span():
    """Beside another span's last token, a start token stands still at its blank or counts on from the context."""
    context, done = [7, MASK, MASK, GMASK], [(1, [8, 9])]
    for blank, counting, expected in ((2, (), [2, 2]), (3, (), [3, 3]), (3, (GMASK,), [5, 6])):
        row = lay_out_row(context, [*done, (blank, [])], SOP, counting_token_ids=counting)
        first, second = continue_positions(
            torch.tensor([row.position_ids]), torch.tensor([row.block_position_ids]), len(row.input_ids) + 2
        )
        assert first[0, -2:].tolist() == expected and second[0, -2:].tolist() == [2, 3]


@pytest.mark.parametrize("counting", [(), (GMASK,)])
@pytest.mark.parametrize("blank", [MASK, GMASK])
def test_the_layout_is_what_token_ids_alone_tell(blank, counting):
    context = [7, 8, blank, 9]
    row = lay_out_row(context, [(2, [10, 11])], SOP, EOP, counting)
    found = glm_inputs(torch.tensor([row.input_ids]), [MASK, GMASK], SOP, counting_token_ids=counting)
    assert [row.position_ids, row.block_position_ids, row.prefix_mask] == [values[0].tolist() for values in found]
    assert row.labels == [-100] * 5 + [10, 11, EOP]


@pytest.mark.mostly_thorough("glm_2d-table40", "rope")
@each_scheme
def test_generate_samples_and_streams_after_a_blank(scheme):
    """`generate()` itself, on a prompt of a text with `[gMASK]` and the start token."""
    model, (context, (blank,)) = fill_model(scheme), context_of("w7 w9 w8 [gMASK]")
    names = {"gmask_token_id": GMASK, "mask_token_id": MASK, "smask_token_id": SMASK, "sop_token_id": SOP}
    for name, token_id in names.items():
        setattr(model.config, name, token_id)
    prompt = torch.tensor([[*context, SOP]])
    options = {"max_new_tokens": NEW, "eos_token_id": None, "pad_token_id": PAD}
    torch.manual_seed(6)
    streamer = CollectingStreamer()
    answer = model.generate(prompt, do_sample=True, temperature=0.7, top_k=0, streamer=streamer, **options)[0].tolist()
    torch.manual_seed(6)
    span = []
    for _ in range(NEW):
        last = next_log_probabilities(model, context, [(blank, span)])
        span.append(torch.multinomial((last[None] / 0.7).softmax(-1), num_samples=1).item())
    assert answer == streamer.pieces == [*prompt[0].tolist(), *span] and streamer.ended
    torch._dynamo.reset()
    static = {"cache_implementation": "static", "compile_config": compile_eagerly()}
    compiled = model.generate(prompt, do_sample=False, **options, **static)
    assert torch.equal(compiled, model.generate(prompt, do_sample=False, use_cache=False, **options))
    assert not torch._dynamo.utils.counters["graph_break"]


def test_the_tiny_vocabulary_names_its_tokens():
    assert WordTokenizer().convert_ids_to_tokens([PAD, EOS, EOP, MASK, GMASK, SMASK, SOP]) == NAMES
