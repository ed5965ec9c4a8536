"""The tokenizer's `build_glm_inputs`: worked by hand, against the collator's corruption, and round trips."""

import random

import numpy as np
import pytest
import torch
from cli_cases import small_model, small_tokenizer
from tokenizer_cases import EXACT, ROUND_TRIPS

from minillm import MiniLLMTokenizer
from minillm.data.span_masking import corrupt


@pytest.fixture(scope="module")
def tokenizer(tokenizers):
    return tokenizers["byte_bpe"]


def test_worked_example(tokenizer):
    """Two blanks, the first filled by two tokens and the second by none."""
    one, two = tokenizer.encode("1"), tokenizer.encode("2")
    a, b, c = (tokenizer.encode(letter)[0] for letter in "abc")
    mask, smask, sop, eop = (tokenizer.convert_tokens_to_ids(t) for t in ("[MASK]", "[sMASK]", *tokenizer_marks()))
    batch = tokenizer.build_glm_inputs("a[MASK]b[sMASK]c", ["12", ""])
    assert {name: rows[0] for name, rows in batch.items()} == {
        "input_ids": [a, mask, b, smask, c, sop, *one, *two, sop, 0],
        "position_ids": [0, 1, 2, 3, 4, 1, 1, 1, 3, 0],
        "block_position_ids": [0, 0, 0, 0, 0, 1, 2, 3, 1, 0],
        "prefix_mask": [1, 1, 1, 1, 1, 0, 0, 0, 0, 0],
        "attention_mask": [1, 1, 1, 1, 1, 1, 1, 1, 1, 0],
        "labels": [-100] * 6 + [*one, *two, eop, eop],
    }


def tokenizer_marks():
    return "<|startofpiece|>", "<|endofpiece|>"


def test_ready_to_generate(tokenizer):
    texts = ["a[gMASK]", "a b c[MASK]d[MASK]"]
    batch = tokenizer.build_glm_inputs(texts, return_tensors="pt")
    assert "labels" not in batch and batch["input_ids"][:, -1].tolist() == [tokenizer.sop_token_id] * 2
    assert batch["attention_mask"].tolist() == [[0] * 4 + [1] * 3, [1] * 7]
    assert batch["position_ids"].tolist() == [[0] * 4 + [0, 1, 1], [0, 1, 2, 3, 4, 5, 3]]
    assert batch["block_position_ids"].tolist() == [[0] * 6 + [1]] * 2
    assert batch["prefix_mask"].tolist() == [[0] * 4 + [1, 1, 0], [1] * 6 + [0]]
    counting = tokenizer.build_glm_inputs(texts, gmask_counts=True)
    assert counting["position_ids"] == [[0] * 4 + [0, 1, 2], [0, 1, 2, 3, 4, 5, 3]]


def test_generate_takes_them():
    small = small_tokenizer()
    model = small_model(small, "prefix", rope_2d=True)
    texts = ["the reader[MASK] of each file", "value[MASK]"]
    inputs = small.build_glm_inputs(texts, return_tensors="pt")
    generated = model.generate(**inputs, max_new_tokens=5, do_sample=False, min_new_tokens=5)
    filling = model.fill(texts, small, max_new_tokens=5, do_sample=False, min_new_tokens=5)
    assert generated[:, -5:].tolist() == [own[0] for own in filling.fill_ids]


def test_padding_sides_and_lengths(tokenizer):
    texts, fills = ["a[MASK]", "a b c[MASK]"], ["b", "d"]
    right = tokenizer.build_glm_inputs(texts, fills)
    left = tokenizer.build_glm_inputs(texts, fills, padding_side="left")
    alone = [tokenizer.build_glm_inputs(text, [fill]) for text, fill in zip(texts, fills, strict=True)]
    loose = tokenizer.build_glm_inputs(texts, fills, padding=False)
    wide = tokenizer.build_glm_inputs(texts, fills, padding="max_length", max_length=9)
    fillers = {"input_ids": tokenizer.pad_token_id, "labels": -100}
    for name, rows in right.items():
        short, filler = alone[0][name][0], [fillers.get(name, 0)]
        assert rows == [short + filler * 2, alone[1][name][0]]
        assert left[name] == [filler * 2 + short, alone[1][name][0]]
        assert loose[name] == [one[name][0] for one in alone]
        assert wide[name] == [short + filler * 4, alone[1][name][0] + filler * 2]
    assert isinstance(tokenizer.build_glm_inputs(texts, return_tensors="np")["input_ids"], np.ndarray)


def test_the_collator_makes_the_same_of_a_text(tokenizer):
    """Spans cut out of random texts, as token ids and as strings with blanks."""
    seed = random.SystemRandom().randrange(2**32)
    print(f"seed {seed}")
    rng = random.Random(seed)
    for _ in range(50):
        words = ["".join(rng.choice("abxyz你好") for _ in range(3)) for _ in range(rng.randint(2, 9))]
        inside = [rng.random() < 0.4 for _ in words]
        inside[0] = True
        pieces = [tokenizer.encode(f" {word}") for word in words]
        edges = np.cumsum([0, *map(len, pieces)])
        spans = [[edges[at], edges[at + 1]] for at, cut in enumerate(inside) if cut]
        text = "".join("[MASK]" if cut else f" {word}" for word, cut in zip(words, inside, strict=True))
        fills = [f" {word}" for word, cut in zip(words, inside, strict=True) if cut]
        made = tokenizer.build_glm_inputs(text, fills)
        names = {name: getattr(tokenizer, name) for name in ("mask_token_id", "sop_token_id", "eop_token_id")}
        expected = corrupt(np.concatenate(pieces), spans, **names)
        for name in ("input_ids", "position_ids", "block_position_ids"):
            assert made[name][0][:-1] == getattr(expected, name).tolist(), name
        assert made["labels"][0] == expected.labels.tolist()
        assert sum(made["prefix_mask"][0]) == expected.context_length


@pytest.mark.parametrize("model", EXACT)
@pytest.mark.parametrize("text", [text for text in ROUND_TRIPS.values() if len(text) > 4])
def test_round_trips(model, text, tokenizers):
    """Text with two stretches cut out comes back from Parts A and B, to the character."""
    tokenizer, rng = tokenizers[model], random.Random(0)
    for _ in range(10):
        at = sorted(rng.choices(range(len(text) + 1), k=4))
        pieces = [text[start:stop] for start, stop in zip([0, *at], [*at, len(text)], strict=True)]
        blanked = f"{pieces[0]}[MASK]{pieces[2]}[sMASK]{pieces[4]}"
        batch = tokenizer.build_glm_inputs(blanked, [pieces[1], pieces[3]])
        ids, context = batch["input_ids"][0], sum(batch["prefix_mask"][0])
        assert tokenizer.decode(ids[:context]) == blanked
        spans = tokenizer.decode(ids[context : sum(batch["attention_mask"][0])]).split("<|startofpiece|>")[1:]
        assert spans == [pieces[1], pieces[3]]


@pytest.mark.parametrize("text", [text for text in ROUND_TRIPS.values() if len(text) > 4])
def test_text_around_blanks_is_kept_by_fill(text):
    tokenizer = small_tokenizer()
    model = small_model(tokenizer, "prefix", max_position_embeddings=256)
    middle = len(text) // 2
    filled = model.fill(
        f"{text}[MASK]{text[:middle]}[MASK]{text[middle:]}", tokenizer, max_new_tokens=3, do_sample=False
    )
    first, second = filled.fills[0]
    assert filled.texts == [f"{text}{first}{text[:middle]}{second}{text[middle:]}"]


REFUSED = {
    "no blank": (["a[MASK]", "b"], None, {}, r"text 1 holds no blank \(\[MASK\], \[gMASK\], \[sMASK\]\): 'b'"),
    "no text": ([], None, {}, "no text"),
    "fills of fewer texts": (["a[MASK]", "b[MASK]"], ["c"], {}, "those of 1 texts; 2 texts"),
    "fewer fills": ("a[MASK][MASK]", ["b"], {}, "text 0 has 2 blanks, but 1 fills"),
    "too long": (["a[MASK]", "a b[MASK]"], None, {"max_length": 3}, "text 1 takes 4 tokens; `max_length` is 3"),
    "no length": ("a[MASK]", None, {"padding": "max_length"}, "needs `max_length`"),
}


@pytest.mark.parametrize(("texts", "fills", "options", "message"), REFUSED.values(), ids=REFUSED)
def test_what_is_refused(texts, fills, options, message, tokenizer):
    with pytest.raises(ValueError, match=message):
        tokenizer.build_glm_inputs(texts, fills, **options)


def test_tokens_must_have_names(tokenizer):
    bare = MiniLLMTokenizer(tokenizer_object=tokenizer.backend_tokenizer)
    with pytest.raises(ValueError, match="names a blank"):
        bare.build_glm_inputs("a[MASK]")
    bare.mask_token = "[MASK]"
    with pytest.raises(ValueError, match="names `sop_token_id`"):
        bare.build_glm_inputs("a[MASK]")
    bare.sop_token = "<|startofpiece|>"
    assert bare.build_glm_inputs("a[MASK]")["prefix_mask"] == [[1, 1, 0]]
    with pytest.raises(ValueError, match="eop_token"):
        bare.build_glm_inputs("a[MASK]", ["b"])


def test_training_on_them_lowers_the_loss():
    tokenizer = small_tokenizer()
    model = small_model(tokenizer, "prefix", rope_2d=True).train()
    texts = ["the reader[MASK] of each file", "[MASK] returns value"]
    inputs = tokenizer.build_glm_inputs(texts, [" returns line", "reader"], return_tensors="pt")
    optimizer, losses = torch.optim.Adam(model.parameters(), lr=1e-2), []
    for _ in range(60):
        loss = model(**inputs).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.05 < losses[0]
    filled = model.eval().fill(texts, tokenizer, max_new_tokens=8, do_sample=False)
    assert filled.texts == ["the reader returns line of each file", "reader returns value"]
