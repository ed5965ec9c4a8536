"""Collators over random samples and settings: the batch holds the documents that a plain loop makes, each once."""

import pytest
from glm_cases import CLS, END, STOP, documents_of, glm, naive_corruption, restore
from hypothesis import assume
from hypothesis import strategies as st
from random_cases import maybe, random_test

from minillm.data.documents import NothingToScoreError
from minillm.training import (
    DataCollatorForCausalLM,
    DataCollatorForPrefixLM,
    DataCollatorForSFT,
    pack_dataset,
)

PAD = 7
# Few ids, so that documents repeat and padding's id occurs among them.
IDS = st.integers(0, 9)


@st.composite
def settings_of_rows(draw, overlong):
    """Arguments of a collator."""
    packing = draw(st.booleans())
    multiple = draw(maybe(st.integers(1, 3)))
    length = draw(st.integers(2, 9) if packing else maybe(st.integers(2, 9)))
    if length is not None and multiple is not None:
        length = max(2, multiple) * draw(st.integers(1, 3)) if multiple > 1 else length
    return {
        "packing": packing,
        "max_length": length,
        "pad_to_multiple_of": multiple,
        "padding": draw(st.sampled_from(["longest", "max_length"] if length else ["longest"])),
        "overlong": draw(st.sampled_from(overlong)),
        "pad_token_id": PAD,
    }


@st.composite
def samples(draw):
    """(what the collator is given, the ids without padding, whether each is scored)."""
    ids = draw(st.lists(IDS, min_size=1, max_size=14))
    real = draw(st.lists(st.booleans(), min_size=len(ids), max_size=len(ids)))
    scored = draw(st.lists(st.booleans(), min_size=len(ids), max_size=len(ids)))
    form = draw(st.sampled_from(["list", "mapping", "labels", "padded"]))
    kept = [token for token, is_real in zip(ids, real, strict=True) if is_real or form != "padded"]
    assume(kept)
    if form == "list":
        return ids, ids, [True] * len(ids)
    if form == "mapping":
        return {"input_ids": ids}, ids, [True] * len(ids)
    if form == "labels":
        labels = [token if is_scored else -100 for token, is_scored in zip(ids, scored, strict=True)]
        return {"input_ids": ids, "labels": labels}, ids, scored
    return {"input_ids": ids, "attention_mask": [int(is_real) for is_real in real]}, kept, [True] * len(kept)


def cut(ids, scored, settings):
    """The documents (ids, scored) that a text becomes under `max_length`."""
    count, length = len(ids), settings["max_length"]
    if length is None or count <= length:
        spans = [(0, count)]
    elif settings["overlong"] == "truncate":
        spans = [(0, length)]
    else:
        spans = [(start, min(start + length, count)) for start in range(0, count, length)]
        if spans[-1][1] - spans[-1][0] == 1:
            # A token alone would have nothing to be predicted from.
            spans[-1] = (count - 2, count)
    return [(ids[start:stop], scored[start:stop]) for start, stop in spans]


def labelled(ids, scored):
    return [token if at and is_scored else -100 for at, (token, is_scored) in enumerate(zip(ids, scored, strict=True))]


def rows_of(batch, packing):
    """The documents of each row of a batch, as dicts of lists, whose layout is checked on the way."""
    lists = {name: tensor.tolist() for name, tensor in batch.items()}
    for index, mask in enumerate(lists["attention_mask"]):
        count = sum(mask)
        assert mask == [1] * count + [0] * (len(mask) - count) and count > 0
        row = {name: values[index] for name, values in lists.items()}
        fills = {"input_ids": PAD, "labels": -100}
        for name, values in row.items():
            assert values[count:] == [fills.get(name, 0)] * (len(mask) - count), name
        numbers = row["document_ids"][:count] if packing else [1] * count
        found = []
        for number in range(1, numbers[-1] + 1):
            start, size = numbers.index(number), numbers.count(number)
            assert numbers[start : start + size] == [number] * size
            document = {name: values[start : start + size] for name, values in row.items()}
            if packing:
                assert document["position_ids"] == list(range(size))
            found.append(document)
        yield found


def assert_width(batch, settings, longest):
    width = max(longest, settings["max_length"]) if settings["padding"] == "max_length" else longest
    multiple = settings["pad_to_multiple_of"] or 1
    assert batch["input_ids"].shape[1] == -(-width // multiple) * multiple


def collated(collator, given, documents):
    """The documents of a batch; None if there is nothing to score, which is then refused."""
    if all(label == -100 for _, labels in documents for label in labels):
        with pytest.raises(NothingToScoreError):
            collator(given)
        return None
    batch = collator(given)
    rows = list(rows_of(batch, collator.packing))
    longest = max(sum(len(document["input_ids"]) for document in row) for row in rows)
    assert_width(batch, vars(collator), longest)
    if collator.packing:
        assert longest <= collator.max_length
        assert len(rows) <= len(documents)
    else:
        assert all(len(row) == 1 for row in rows)
    return [document for row in rows for document in row]


def key(documents):
    return sorted(repr(sorted(document.items())) for document in documents)


def without_numbers(documents):
    return [{name: value for name, value in document.items() if name != "document_ids"} for document in documents]


@random_test(
    quick=60,
    full=6000,
    texts=st.lists(samples(), min_size=1, max_size=6),
    settings=settings_of_rows(["split", "truncate"]),
    shuffled=st.randoms(use_true_random=False),
)
def test_causal_batches_are_those_of_a_plain_loop(texts, settings, shuffled):
    collator, given = DataCollatorForCausalLM(**settings), [sample for sample, _, _ in texts]
    pieces = [piece for _, ids, scored in texts for piece in cut(ids, scored, settings)]
    documents = [(ids, labelled(ids, scored)) for ids, scored in pieces]
    found = collated(collator, given, documents)
    if found is None:
        return
    assert sorted((document["input_ids"], document["labels"]) for document in found) == sorted(documents)
    other = shuffled.sample(given, len(given))
    assert key(without_numbers(found)) == key(without_numbers(collated(collator, other, documents)))
    if settings["packing"]:
        kept = [labels for _, labels in documents if any(label != -100 for label in labels)]
        packed = collated(collator, pack_dataset(given, collator), documents)
        assert sorted(document["labels"] for document in packed) == sorted(kept)


@random_test(
    quick=40,
    full=4000,
    texts=st.lists(samples(), min_size=1, max_size=6),
    settings=settings_of_rows(["split", "truncate"]),
    fraction=st.tuples(st.floats(0, 1), st.floats(0, 1)).map(lambda pair: tuple(sorted(pair))),
    seed=st.integers(0, 9),
    shuffled=st.randoms(use_true_random=False),
)
def test_prefixes_begin_documents_and_leave_a_token_to_score(texts, settings, fraction, seed, shuffled):
    collator = DataCollatorForPrefixLM(**settings, prefix_fraction=fraction, seed=seed)
    given = [sample for sample, _, _ in texts]
    pieces = [piece for _, ids, scored in texts for piece in cut(ids, scored, settings)]
    found = collated(collator, given, [(ids, labelled(ids, scored)) for ids, scored in pieces])
    if found is None:
        return
    lengths = {}
    for document in found:
        ids, count = document["input_ids"], document["prefix_mask"].count(1)
        lengths[repr(ids), repr(document["labels"])] = count
        assert document["prefix_mask"] == [1] * count + [0] * (len(ids) - count)
        assert document["labels"][:count] == [-100] * count and count >= 1
    # Every document's labels are the plain ones outside of its prefix, one of them at least.
    plain = sorted((ids, labelled(ids, scored)) for ids, scored in pieces)
    for document in found:
        count = document["prefix_mask"].count(1)
        wanted = [
            labels
            for ids, labels in plain
            if ids == document["input_ids"] and labels[count:] == document["labels"][count:]
        ]
        assert wanted
        last = max((at for at, label in enumerate(wanted[0]) if label != -100), default=None)
        size = len(document["input_ids"])
        assert count <= max(1, fraction[1] * size)
        if last is not None and any(label != -100 for label in document["labels"]):
            assert count >= min(last, int(fraction[0] * size))
    assert sorted(document["input_ids"] for document in found) == sorted(ids for ids, _ in plain)
    other = collated(collator, shuffled.sample(given, len(given)), [(ids, labels) for ids, labels in plain])
    assert key(without_numbers(found)) == key(without_numbers(other))


@st.composite
def answers(draw):
    """(a sample in one of the forms that tell its answer, ids, which tokens are the answer)."""
    prompt = draw(st.lists(IDS, min_size=1, max_size=8))
    answer = draw(st.lists(IDS, min_size=1, max_size=8))
    ids = prompt + answer
    mask = [0] * len(prompt) + [1] * len(answer)
    form = draw(st.sampled_from(["ids", "length", "completion_mask", "assistant_masks", "labels"]))
    if form in ("assistant_masks", "labels"):
        # Answers may alternate with prompts; the last token is of one.
        mask = [*draw(st.lists(st.integers(0, 1), min_size=len(ids) - 1, max_size=len(ids) - 1)), 1]
    if form == "ids":
        sample = {"prompt_ids": prompt, "completion_ids": answer}
    elif form == "length":
        sample = {"input_ids": ids, "prompt_length": len(prompt)}
    elif form == "labels":
        sample = {"input_ids": ids, "labels": [t if one else -100 for t, one in zip(ids, mask, strict=True)]}
    else:
        sample = {"input_ids": ids, form: mask}
    return sample, ids, [0, *mask[1:]]


def cut_answer(ids, mask, length):
    """Of a text that is too long, the prompt loses its start, down to half of the row, then the text its end."""
    surplus = 0 if length is None else max(0, len(ids) - length)
    prompt = mask.index(1)
    start = min(surplus, max(0, prompt - length // 2)) if surplus else 0
    stop = len(ids) - (surplus - start)
    return ids[start:stop], mask[start:stop]


@random_test(
    quick=60,
    full=6000,
    texts=st.lists(answers(), min_size=1, max_size=5),
    settings=settings_of_rows(["truncate"]),
    prefix=st.booleans(),
)
def test_answers_alone_are_scored(texts, settings, prefix):
    collator = DataCollatorForSFT(**settings, prompt_is_prefix=prefix)
    documents, expected = [], []
    for _, ids, mask in texts:
        ids, mask = cut_answer(ids, mask, settings["max_length"])
        mask = [0, *mask[1:]]
        documents.append((ids, [token if one else -100 for token, one in zip(ids, mask, strict=True)]))
        number, numbers = 0, []
        for at, one in enumerate(mask):
            number += not one and (at == 0 or mask[at - 1])
            numbers.append(0 if one else number)
        expected.append((*documents[-1], numbers if prefix else None))
    found = collated(collator, [sample for sample, _, _ in texts], documents)
    if found is not None:
        got = [(each["input_ids"], each["labels"], each.get("prefix_mask")) for each in found]
        assert sorted(got, key=repr) == sorted(expected, key=repr)


GLM_TEXTS = st.lists(st.sampled_from([STOP, CLS, END, *range(9, 20)]), min_size=1, max_size=30)


@random_test(
    quick=60,
    full=6000,
    texts=st.lists(GLM_TEXTS, min_size=1, max_size=5),
    kind=st.sampled_from([None, "token", "sentence", "document"]),
    packing=st.booleans(),
    options=st.fixed_dictionaries(
        {},
        optional={
            "mask_fraction": st.floats(0.01, 0.5),
            "mean_span_length": st.floats(0.1, 9),
            "document_fraction": st.tuples(st.floats(0.01, 1), st.floats(0.01, 1)).map(lambda pair: sorted(pair)),
            "seed": st.integers(0, 99),
            "max_length": st.integers(8, 64),
        },
    ),
)
def test_blanks_and_spans_are_the_text_again(texts, kind, packing, options):
    collator = glm(kind, packing=packing, **options)
    words = [token for text in texts for token in text if token not in (CLS, END)]
    if not words:
        with pytest.raises(NothingToScoreError):
            collator(texts)
        return
    batch = collator(texts)
    assert batch["input_ids"].shape[1] <= collator.max_length
    assert (batch["attention_mask"].sum(-1) < collator.max_length).all()
    whole = []
    for document in documents_of(batch):
        blank, text, fills = restore(document)
        whole.append(text)
        assert not {CLS, END} & {token for fill in fills.values() for token in fill}
        assert len(document["input_ids"]) <= collator.most_slots(len(text))
        places, shift, spans = {}, 0, []
        for place in sorted(fills):
            places[place] = len(spans)
            spans.append((place + shift, place + shift + len(fills[place])))
            shift += len(fills[place]) - 1
        expected = naive_corruption(text, spans, [places[place] for place in fills], blank)
        names = ("input_ids", "labels", "position_ids", "block_position_ids")
        assert [*(document[name] for name in names), document["prefix_mask"].count(1)] == list(expected)
    longest = collator._longest
    pieces = [text[start : start + longest] for text in texts for start in range(0, len(text), longest)]
    assert sorted(whole) == sorted(pieces)
