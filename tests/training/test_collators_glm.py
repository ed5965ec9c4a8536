"""The GLM collator: arrays by hand, what holds for any text, packing, draws, refusals."""

import random

import numpy as np
import pytest
import torch
from datasets import Dataset
from glm_cases import (
    BLANKS,
    CLS,
    END,
    EOP,
    FIRST_WORD,
    GMASK,
    IDS,
    MASK,
    PAD,
    SOP,
    STOP,
    documents_of,
    glm,
    naive_corruption,
    random_texts,
    restore,
)
from torch.utils.data import DataLoader

from minillm import MiniLLMTokenizer
from minillm.data.span_masking import corrupt, most_spans
from minillm.infilling import glm_inputs
from minillm.training import DataCollatorForGLM, DataCollatorForPrefixLM, pack_dataset
from minillm.training.collators import uniform_draw
from minillm.training.glm_collator import draws

NAMES = ["input_ids", "attention_mask", "labels", "position_ids", "block_position_ids", "prefix_mask", "document_ids"]


def lists(batch):
    return {name: tensor.tolist() for name, tensor in batch.items()}


def by_text(documents):
    """{the text put together again: the document}."""
    return {tuple(restore(document)[1]): document for document in documents}


def test_whole_documents_packed_by_hand():
    # All of each document is cut out, so nothing depends on a draw. Both need 2 + 2 and 1 + 2 slots, and one is left.
    collator = glm("document", document_fraction=(1.0, 1.0), max_length=9, padding="max_length")
    assert lists(collator([[CLS, 21], {"input_ids": [PAD, 22], "attention_mask": [0, 1]}])) == {
        "input_ids": [[CLS, GMASK, SOP, 21, GMASK, SOP, 22, PAD, PAD]],
        "attention_mask": [[1, 1, 1, 1, 1, 1, 1, 0, 0]],
        # The first document's end token is predicted in the second one's first slot, the second's in the padding.
        "labels": [[-100, -100, -100, 21, EOP, -100, 22, EOP, -100]],
        "position_ids": [[0, 1, 1, 1, 0, 0, 0, 0, 0]],
        "block_position_ids": [[0, 0, 1, 2, 0, 1, 2, 0, 0]],
        "prefix_mask": [[1, 1, 0, 0, 1, 0, 0, 0, 0]],
        "document_ids": [[1, 1, 1, 1, 2, 2, 2, 0, 0]],
    }


def test_maximum_length_exactly_met():
    documents = [[CLS, 21], [22]]
    options = {"document_fraction": (1.0, 1.0)}
    batch = glm("document", max_length=8, **options)(documents)
    assert batch["input_ids"].shape == (1, 8)
    assert batch["attention_mask"].tolist() == [[1] * 7 + [0]]
    assert batch["labels"][0, -1] == EOP
    assert glm("document", max_length=7, **options)(documents)["input_ids"].tolist() == [
        [CLS, GMASK, SOP, 21, PAD],
        [GMASK, SOP, 22, PAD, PAD],
    ]


def test_tensors_are_int64_and_all_there():
    for packing in (True, False):
        batch = glm(packing=packing)([[CLS, *range(10, 30), END]])
        assert sorted(batch) == sorted(NAMES)
        assert all(tensor.dtype == torch.int64 for tensor in batch.values())


@pytest.mark.parametrize("options", [{"pad_to_multiple_of": 16}, {"padding": "max_length"}], ids=str)
def test_width_of_the_rows(options):
    assert glm(**options)([[*range(10, 20)]])["input_ids"].shape == (1, 16 if "pad_to_multiple_of" in options else 64)


@pytest.mark.parametrize("kind", [None, "token", "sentence", "document"])
@pytest.mark.parametrize("packing", [True, False], ids=["packed", "unpacked"])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_texts_can_be_put_together_again(kind, packing, seed):
    texts = random_texts(seed, 150)
    batch = glm(kind, max_length=256, packing=packing)(texts)
    assert int((batch["document_ids"] * batch["attention_mask"]).diff().clamp(max=0).lt(0).sum()) <= len(texts)
    found = []
    for document in documents_of(batch):
        blank, text, fills = restore(document)
        found.append(text)
        words = [token for token in text if token not in (CLS, END)]
        hidden = [token for fill in fills.values() for token in fill]
        assert not {CLS, END} & set(hidden)
        assert (len(fills) > 0) == (len(words) > 0)
        assert blank in ({BLANKS[kind], None} if kind else {*BLANKS.values(), None})
        if blank == GMASK:
            runs_of_words = " ".join("w" if token > END else "|" for token in text).split("|")
            assert len(hidden) >= min(len(words) / 2, len(runs_of_words[-1].split()) or 1)
    assert sorted(found) == sorted(texts)
    assert (batch["input_ids"][batch["attention_mask"] == 0] == PAD).all()
    scored = (batch["labels"] != -100).sum()
    assert scored == (batch["block_position_ids"] > 0).sum()


@pytest.mark.parametrize("seed", [0, 1])
def test_tensors_are_those_of_a_plain_loop(seed):
    """The spans read from the batch, cut out by a loop, give the batch."""
    for document in documents_of(glm(max_length=256)(random_texts(seed, 60))):
        blank, text, fills = restore(document)
        places, shift, spans = {}, 0, []
        for place in sorted(fills):
            places[place] = len(spans)
            spans.append((place + shift, place + shift + len(fills[place])))
            shift += len(fills[place]) - 1
        expected = naive_corruption(text, spans, [places[place] for place in fills], blank)
        found = [document[name] for name in ("input_ids", "labels", "position_ids", "block_position_ids")]
        assert [*found, document["prefix_mask"].count(1)] == list(expected)


def test_mixture_follows_its_weights():
    texts = random_texts(0, 4000, shortest=10, longest=30, specials=False)
    blanks = [restore(document)[0] for document in documents_of(glm()(texts))]
    for blank, share in zip(BLANKS.values(), (0.5, 0.25, 0.25), strict=True):
        assert abs(blanks.count(blank) / len(texts) - share) < 0.025
    blanks = [restore(document)[0] for document in documents_of(glm(mixture={"document": 3, "token": 1.0})(texts))]
    assert abs(blanks.count(GMASK) / len(texts) - 0.75) < 0.025
    assert blanks.count(MASK) + blanks.count(GMASK) == len(texts)


def test_token_spans_cover_15_percent_in_random_order():
    texts = random_texts(0, 150, shortest=400, longest=400, specials=False)
    documents = [restore(document) for document in documents_of(glm("token", max_length=512)(texts))]
    hidden = sum(len(fill) for _, _, fills in documents for fill in fills.values())
    assert 0.15 < hidden / (150 * 400) < 0.156
    firsts = [list(fills).index(min(fills)) / (len(fills) - 1) for _, _, fills in documents]
    # The text's first span stands anywhere in Part B: mean 1/2, standard error of 150 draws 0.024.
    assert abs(np.mean(firsts) - 0.5) < 0.08 and 0.2 < np.mean(np.array(firsts) < 0.25) < 0.34
    assert all(list(fills) != sorted(fills) for _, _, fills in documents)


def test_document_spans_are_uniform_from_half_to_all():
    texts = random_texts(0, 2000, shortest=100, longest=100, specials=False)
    documents = [restore(document) for document in documents_of(glm("document", max_length=128)(texts))]
    lengths = []
    for _, text, fills in documents:
        ((place, fill),) = fills.items()
        assert fill == text[place:]
        lengths.append(len(fill))
    assert min(lengths) == 50 and max(lengths) == 100
    assert np.abs(np.histogram(lengths, bins=3, range=(50, 101))[0] / 2000 - 1 / 3).max() < 0.035


def test_sentence_spans_are_whole_sentences():
    texts = random_texts(0, 300, shortest=150, longest=150, specials=False)
    shares = []
    for document in documents_of(glm("sentence", max_length=256)(texts)):
        _, text, fills = restore(document)
        hidden, shift = 0, 0
        for place in sorted(fills):
            start, stop = place + shift, place + shift + len(fills[place])
            assert start == 0 or text[start - 1] == STOP
            assert stop == len(text) or text[stop - 1] == STOP
            assert STOP not in text[start : stop - 1]
            shift += len(fills[place]) - 1
            hidden += stop - start
        # Fewer only where no more spans may be, or all sentences but one are cut out.
        sentences = text[:-1].count(STOP) + 1
        assert hidden >= 0.15 * len(text) or len(fills) in (most_spans(150, 0.15, 3.0), sentences - 1)
        shares.append(hidden / len(text))
    # Sentences have 41 words on average, so the last one reaches far over the mark.
    assert 0.2 < np.mean(shares) < 0.5


def test_neighbouring_sentences_have_blanks_of_their_own():
    text = [21, STOP, 22, STOP, 23, STOP]
    seen = [
        restore(documents_of(glm("sentence", mask_fraction=0.5, mean_span_length=0.01, seed=seed)([text]))[0])
        for seed in range(20)
    ]
    assert {0: [21, STOP], 1: [22, STOP]} in [fills for _, _, fills in seen]


@pytest.mark.parametrize("text", [[CLS, END], [END]])
def test_texts_of_special_tokens_are_context_only(text):
    document = documents_of(glm()([text, [21, 22, 23]]))[0]
    assert document["input_ids"] == text and document["prefix_mask"] == [1] * len(text)
    assert document["labels"] == [-100] * (len(text) + 1)
    with pytest.raises(ValueError, match=r"none of the 1 samples .* a document needs a token that is not special"):
        glm()([text])
    assert len(pack_dataset([text, [21, 22]], glm())) == 1


@pytest.mark.parametrize("kind", ["token", "sentence", "document"])
def test_one_token_documents(kind):
    batch = lists(glm(kind)([[21]]))
    assert batch["input_ids"] == [[BLANKS[kind], SOP, 21, PAD]]
    assert batch["labels"] == [[-100, -100, 21, EOP]]


def test_labels_keep_tokens_from_being_cut_out():
    text = list(range(FIRST_WORD, FIRST_WORD + 40))
    labels = [-100] * 20 + text[20:]
    for kind in BLANKS:
        _, found, fills = restore(documents_of(glm(kind)([{"input_ids": text, "labels": labels}]))[0])
        assert found == text and {token for fill in fills.values() for token in fill} <= set(text[20:])


def test_overlong_documents_are_split_before_masking():
    collator = glm(max_length=64)
    longest = max(count for count in range(64) if collator.most_slots(count) <= 63)
    text = [FIRST_WORD + place % 40 for place in range(3 * longest + 1)]
    parts = [restore(document)[1] for document in documents_of(collator([text]))]
    assert sorted(parts, key=len) == sorted(
        [text[start : start + longest] for start in range(0, len(text), longest)], key=len
    )
    with pytest.raises(ValueError, match=f"a document has {len(text)} tokens; with blanks, .* allows {longest}"):
        glm(max_length=64, overlong="error")([text])
    assert glm(max_length=64, overlong="error")([text[:longest]])["input_ids"].shape[0] == 1


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("length", [16, 64, 256])
def test_no_row_is_longer_than_max_length_in_any_epoch(seed, length):
    collator = glm(max_length=length)
    rows = pack_dataset(random_texts(seed, 100, longest=2 * length), collator)
    for epoch in range(20):
        collator.set_epoch(epoch)
        assert collator(rows)["labels"].shape[1] <= length


def test_padding_of_a_packed_data_set_stays_small():
    print("seed 0")
    rng = random.Random(0)
    texts = [[rng.randrange(STOP, 60) for _ in range(max(2, int(rng.lognormvariate(5.0, 1.0))))] for _ in range(2000)]
    collator = glm(max_length=1024, padding="max_length")
    rows = pack_dataset(texts, collator)
    real = slots = 0
    for start in range(0, len(rows), 16):
        mask = collator(rows[start : start + 16])["attention_mask"]
        real, slots = real + int(mask.sum()), slots + mask.numel()
    assert 1 - real / slots < 0.07


@pytest.mark.parametrize("kind", ["list", "datasets"])
def test_packed_data_set_goes_through_the_collator_unchanged(kind):
    texts = random_texts(3, 60)
    collator = glm(max_length=256)
    samples = Dataset.from_list([{"input_ids": text} for text in texts]) if kind == "datasets" else texts
    rows = pack_dataset(samples, collator)
    assert set(rows[0]) == {"input_ids", "document_ids", "labels"}
    packed, direct = collator([rows[index] for index in range(len(rows))]), collator(texts)
    assert list(packed) == list(direct)
    assert all(torch.equal(packed[name], direct[name]) for name in direct)


def test_draws_do_not_depend_on_order_batch_packing_or_workers():
    texts = random_texts(4, 60)
    whole = by_text(documents_of(glm(max_length=256)(texts)))
    alone = by_text([documents_of(glm(packing=False, max_length=256)([text]))[0] for text in reversed(texts)])
    assert {text: document["input_ids"] for text, document in whole.items()} == {
        text: document["input_ids"] for text, document in alone.items()
    }
    for workers in (1, 2):
        loader = DataLoader(texts, batch_size=7, collate_fn=glm(max_length=256), num_workers=workers)
        loaded = by_text([document for batch in loader for document in documents_of(batch)])
        assert {text: document["labels"] for text, document in loaded.items()} == {
            text: document["labels"] for text, document in whole.items()
        }


def test_draws_change_with_epoch_and_seed_and_come_back():
    texts = random_texts(5, 40)
    collator = glm()
    first = collator(texts)["input_ids"].tolist()
    collator.set_epoch(1)
    assert collator(texts)["input_ids"].tolist() != first
    collator.set_epoch(0)
    assert collator(texts)["input_ids"].tolist() == first
    assert glm(seed=1)(texts)["input_ids"].tolist() != first


def test_rows_with_fixed_draws_stay_the_same_in_all_epochs():
    texts = random_texts(6, 40)
    collator = glm()
    first = lists(collator(pack_dataset(texts, collator)))
    rows = pack_dataset(texts, collator, fixed_prefixes=True)
    loose = pack_dataset(texts, collator)
    collator.set_epoch(3)
    assert lists(collator(rows)) == first != lists(collator(loose))
    assert lists(collator(pack_dataset(rows, collator))) == first


def test_draws_are_fixed_numbers():
    """The draws must not change between versions or machines."""
    ids = np.arange(5)
    found = draws(0, 0, ids)
    bits = np.random.PCG64(int(uniform_draw(0, 0, ids) * 2**53)).random_raw(2)
    assert found(2).tolist() == [(int(raw) >> 11) / 2**53 for raw in bits]
    assert glm("token")([list(range(10, 34))])["input_ids"].tolist() == [
        [*range(10, 20), MASK, *range(21, 25), MASK, 28, 29, 30, MASK, 33, SOP, 31, 32, SOP, 20, SOP, 25, 26, 27, PAD]
    ]
    many = draws(1, 2, ids)(10_000)
    assert many.min() >= 0 and many.max() < 1 and abs(many.mean() - 0.5) < 0.01


@pytest.fixture(scope="module")
def tokenizer():
    texts = [f"This is line {number}. Is it? Yes, it is! And {number}.5 too.\n" for number in range(50)]
    return MiniLLMTokenizer.train_from_iterator(texts, vocab_size=400, show_progress=False)


def test_ids_and_sentences_come_from_the_tokenizer(tokenizer):
    collator = DataCollatorForGLM(tokenizer, max_length=128, mixture={"sentence": 1})
    text = "This is line 1. Is it? Yes, it is! And 1.5 too."
    ids = [tokenizer.bos_token_id, *tokenizer(text)["input_ids"], tokenizer.eos_token_id]
    sentences = {"This is line 1.", " Is it?", " Yes, it is!", " And 1.5 too."}
    for epoch in range(8):
        collator.set_epoch(epoch)
        batch = collator([ids])
        assert batch["input_ids"][0, 0] == tokenizer.bos_token_id
        row = batch["input_ids"][0].tolist()
        assert tokenizer.smask_token_id in row and tokenizer.eos_token_id in row
        pieces = tokenizer.decode(row[row.index(tokenizer.sop_token_id) :]).split(tokenizer.sop_token)[1:]
        assert set(pieces[:-1]) | {pieces[-1].replace(tokenizer.pad_token, "")} <= sentences
    given = DataCollatorForGLM(tokenizer, max_length=128, mixture={"token": 1}, mask_token_id=9)
    assert given.mask_token_id == 9 and given.sop_token_id == tokenizer.sop_token_id


@pytest.mark.parametrize("name", sorted(set(IDS) - {"pad_token_id"}))
def test_a_missing_id_is_named(name):
    with pytest.raises(ValueError, match=f"no `{name}`: give it, or a `tokenizer` that has one"):
        glm(**{name: None})


def test_only_the_ids_of_the_mixture_are_needed():
    collator = glm("token", smask_token_id=None, gmask_token_id=None, sentence_end_token_ids=None)
    assert collator([[*range(10, 20)]])["input_ids"].shape[0] == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mixture": {}}, "`mixture` is {}; needed: weights from 0 on of token, sentence, document"),
        ({"mixture": {"token": 0}}, "`mixture` is"),
        ({"mixture": {"token": -1, "document": 2}}, "`mixture` is"),
        ({"mixture": {"tokens": 1}}, "`mixture` is {'tokens': 1}"),
        ({"mixture": {"token": float("nan")}}, "`mixture` is"),
        ({"mask_fraction": 0.0}, "`mask_fraction` is 0.0"),
        ({"mask_fraction": 0.6}, "`mask_fraction` is 0.6; needed: above 0 and at most 0.5"),
        ({"mean_span_length": 0}, "`mean_span_length` is 0"),
        ({"document_fraction": (0.6, 0.5)}, r"`document_fraction` is \(0.6, 0.5\)"),
        ({"document_fraction": (0.0, 1.0)}, "`document_fraction` is"),
        ({"sentence_end_token_ids": None}, "nothing tells where sentences end"),
        ({"overlong": "truncate"}, "`overlong` is 'truncate'; allowed: 'split', 'error'"),
        ({"max_length": 3}, "`max_length` is 3; a document of one token needs 4 slots"),
        ({"pad_token_id": None}, "no id for padding"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        glm(**options)


def test_rows_of_other_collators_are_refused_where_they_do_not_fit():
    causal = {"input_ids": list(range(10, 70)), "document_ids": [1] * 60}
    with pytest.raises(ValueError, match=r"a packed row may need .* `max_length` is 64: pack with this"):
        glm()([causal])
    # Two documents of one token and two need 3 + 4 slots, and one for the last end token.
    short = {"input_ids": [10, 11, 12], "document_ids": [1, 2, 2]}
    assert glm("document", max_length=8)([short])["input_ids"].shape[1] <= 8
    with pytest.raises(ValueError, match=r"may need 7 slots .* `max_length` is 7: pack with this"):
        glm("document", max_length=7)([short])
    prefix = DataCollatorForPrefixLM(max_length=32, pad_token_id=0)
    with pytest.raises(ValueError, match="holds the prefixes of another collator"):
        glm()(pack_dataset([list(range(10, 30))], prefix, fixed_prefixes=True))
    with pytest.raises(ValueError, match="this collator has `packing=False`"):
        glm(packing=False)([{"input_ids": [10, 11], "document_ids": [1, 1]}])


@pytest.mark.parametrize("counts", [False, True])
def test_long_spans_stand_where_generation_puts_them(counts):
    collator = glm("document", gmask_counts=counts, packing=False)
    batch = collator([list(range(10, 30)), [CLS, *range(10, 40), END]])
    # On padding, which is at the end, generation counts on: only real tokens are compared.
    real = batch["attention_mask"].bool()
    counting = [GMASK] if counts else []
    expected = glm_inputs(batch["input_ids"], [GMASK, MASK], SOP, batch["attention_mask"], counting)
    for name, tensor in expected._asdict().items():
        assert torch.equal(batch[name][real], tensor[real]), name
    spans = glm("token", gmask_counts=counts)(random_texts(0, 5))
    assert torch.equal(spans["position_ids"], glm("token")(random_texts(0, 5))["position_ids"])


def test_corrupt_is_what_the_collator_does():
    collator = glm("document", document_fraction=(1.0, 1.0))
    expected = corrupt([21, 22, 23], [[0, 3]], mask_token_id=GMASK, sop_token_id=SOP, eop_token_id=EOP)
    batch = collator([[21, 22, 23]])
    assert batch["labels"][0].tolist() == expected.labels.tolist()
    assert batch["input_ids"][0, :-1].tolist() == expected.input_ids.tolist()
