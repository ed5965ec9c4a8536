"""GLM's corruption in its plainest form, and collators and documents for its tests."""

import random

from minillm.training.glm_collator import DataCollatorForGLM

PAD, MASK, SMASK, GMASK, SOP, EOP, CLS, END, STOP = range(9)
FIRST_WORD = 9
IDS = {
    "pad_token_id": PAD,
    "mask_token_id": MASK,
    "smask_token_id": SMASK,
    "gmask_token_id": GMASK,
    "sop_token_id": SOP,
    "eop_token_id": EOP,
}
BLANKS = {"token": MASK, "sentence": SMASK, "document": GMASK}


def glm(kind=None, **arguments):
    """A collator without tokenizer; `kind` is the only kind of spans."""
    mixture = {} if kind is None else {"mixture": {kind: 1}}
    settings = {"max_length": 64, "special_token_ids": [CLS, END], "sentence_end_token_ids": [STOP], **IDS}
    return DataCollatorForGLM(**{**settings, **mixture, **arguments})


def naive_corruption(ids, spans, order, mask):
    """(input_ids, labels with the slot behind, position_ids, block_position_ids, context length), token by token."""
    context, blank_of = [], {}
    for place, token in enumerate(ids):
        inside = [number for number, (start, stop) in enumerate(spans) if start <= place < stop]
        if not inside:
            context.append(token)
        elif place == spans[inside[0]][0]:
            blank_of[inside[0]] = len(context)
            context.append(mask)
    inputs, positions = list(context), list(range(len(context)))
    blocks, targets = [0] * len(context), {}
    for number in order:
        words = ids[spans[number][0] : spans[number][1]]
        for step, token in enumerate([SOP, *words]):
            targets[len(inputs) + 1] = (words + [EOP])[step]
            inputs.append(token)
            positions.append(blank_of[number])
            blocks.append(step + 1)
    labels = [targets.get(slot, -100) for slot in range(len(inputs) + 1)]
    return inputs, labels, positions, blocks, len(context)


def random_texts(seed, count, shortest=1, longest=120, specials=True):
    """Documents of words and full stops, some begun, ended or interrupted by special tokens."""
    print(f"seed {seed}")
    rng = random.Random(seed)
    texts = []
    for _ in range(count):
        text = [rng.choice([STOP, *range(FIRST_WORD, FIRST_WORD + 40)]) for _ in range(rng.randint(shortest, longest))]
        if specials:
            text = [CLS] * rng.randint(0, 1) + text + [END] * rng.randint(0, 1)
            if rng.random() < 0.2:
                text.insert(rng.randrange(len(text)), END)
        texts.append(text)
    return texts


def documents_of(batch):
    """The documents of a batch: a dict of lists each, `labels` with the slot behind."""
    found = []
    for row in range(len(batch["input_ids"])):
        columns = {name: tensor[row].tolist() for name, tensor in batch.items()}
        numbers = (batch["document_ids"] * batch["attention_mask"])[row].tolist()
        for number in range(1, max(numbers) + 1):
            start, stop = numbers.index(number), numbers.index(number) + numbers.count(number)
            document = {name: values[start:stop] for name, values in columns.items()}
            # The first slot belongs to the document before.
            document["labels"] = [-100, *columns["labels"][start + 1 : stop + 1]]
            found.append(document)
    return found


def restore(document):
    """(blank, text, spans with their blanks' places in Part A): the text put together again from Parts A and B."""
    length = document["prefix_mask"].count(1)
    assert document["prefix_mask"] == [1] * length + [0] * (len(document["prefix_mask"]) - length)
    ids, context = document["input_ids"], document["input_ids"][:length]
    fills, place = {}, length
    while place < len(ids):
        assert ids[place] == SOP
        blank, stop = document["position_ids"][place], place + 1
        while stop < len(ids) and document["block_position_ids"][stop] > 1:
            stop += 1
        assert document["labels"][place + 1 : stop + 1] == [*ids[place + 1 : stop], EOP]
        assert document["position_ids"][place:stop] == [blank] * (stop - place)
        assert document["block_position_ids"][place:stop] == list(range(1, stop - place + 1))
        fills[blank] = ids[place + 1 : stop]
        place = stop
    assert document["labels"][: length + 1] == [-100] * (length + 1)
    text = [token for place, word in enumerate(context) for token in fills.get(place, [word])]
    blanks = {context[place] for place in fills}
    assert len(blanks) <= 1
    return (blanks or {None}).pop(), text, fills
