"""Texts with blanks over a tiny vocabulary, and filling them the slow way: a row at a time, without padding or cache,
positions written down token by token."""

import torch
from matrix_cases import VOCAB, loud_model, tiny_config
from variants import variants

PAD, EOS, EOP, MASK, GMASK, SMASK, SOP = range(7)
NAMES = ["<pad>", "<eos>", "<eop>", "[MASK]", "[gMASK]", "[sMASK]", "<sop>"]
STOPS = (EOS, EOP)
NEW = 6
SCHEMES = variants("glm_2d-table40 rope_2d rope alibi")
# Weights with which some spans end at once, some later and some not at all.
SEEDS = {"glm_2d-table40": 0, "rope_2d": 15, "rope": 5, "alibi": 5}
# One blank, two that touch, three of all kinds (the last two out of their usual places), and one at the very start.
TEXTS = ["w7 w8 [MASK] w9", "w10 [MASK][MASK] w11 w12 w13", "[sMASK] w7 w9 [MASK] w15 w16 [gMASK]", "[MASK] w18"]


class WordTokenizer:
    """Words `w7`, `w8`, ... and GLM's tokens, as much of a tokenizer as filling asks for; blanks between words are
    dropped."""

    pad_token_id, eos_token_id, eop_token_id, sop_token_id = PAD, EOS, EOP, SOP
    mask_token_id, gmask_token_id, smask_token_id = MASK, GMASK, SMASK

    def __init__(self, size=VOCAB):
        self.words = [*NAMES, *(f"w{number}" for number in range(len(NAMES), size))]

    def __call__(self, texts, add_special_tokens=True):
        spaced = [text.replace("[", " [").replace("]", "] ") for text in texts]
        return {"input_ids": [[self.words.index(word) for word in text.split()] for text in spaced]}

    def convert_ids_to_tokens(self, ids):
        return [self.words[token_id] for token_id in ids]

    def decode(self, ids, skip_special_tokens=False):
        special = len(NAMES) if skip_special_tokens else 0
        return " ".join(self.words[token_id] for token_id in ids if token_id >= special)


def fill_model(scheme):
    config = tiny_config(attention_type="prefix", **{**SCHEMES[scheme], "eos_token_id": EOS, "pad_token_id": PAD})
    return loud_model(config, SEEDS[scheme])


def context_of(text):
    """Token ids and the places of the blanks."""
    ids = WordTokenizer()([text])["input_ids"][0]
    return ids, [index for index, token_id in enumerate(ids) if token_id in (MASK, GMASK, SMASK)]


def row_of(model, context, spans):
    """The inputs of one unpadded row: spans are (place of the blank, tokens), each behind a start token."""
    counts = model.config.position_embedding_type != "glm_2d" and not model.config.rope_2d
    ids, first, second = [], [], []
    for index, token_id in enumerate(context):
        ids, first, second = [*ids, token_id], [*first, index], [*second, 0]
    for blank, tokens in spans:
        for step, token_id in enumerate([SOP, *tokens]):
            ids.append(token_id)
            first.append(len(context) + step if counts and context[blank] == GMASK else blank)
            second.append(step + 1)
    named = {"input_ids": ids, "position_ids": first, "block_position_ids": second}
    named["prefix_mask"] = [1] * len(context) + [0] * (len(ids) - len(context))
    return {name: torch.tensor([values]) for name, values in named.items()}


def next_log_probabilities(model, context, spans):
    """Log probabilities [vocabulary] of the token after the last span."""
    with torch.no_grad():
        return model(**row_of(model, context, spans), use_cache=False).logits[0, -1].log_softmax(-1)


def greedy_span(model, context, done, blank):
    span = []
    while len(span) < NEW:
        token = next_log_probabilities(model, context, [*done, (blank, span)]).argmax().item()
        if token in STOPS:
            break
        span.append(token)
    return span


def beam_span(model, context, done, blank, beams=3):
    """The likeliest of the best `beams` beginnings of NEW tokens that hold no end."""
    hypotheses = [(0.0, [])]
    for _ in range(NEW):
        longer = []
        for score, span in hypotheses:
            log_probabilities = next_log_probabilities(model, context, [*done, (blank, span)])
            scores = enumerate(log_probabilities.tolist())
            longer += [(score + added, [*span, token]) for token, added in scores if token not in STOPS]
        hypotheses = sorted(longer, reverse=True)[:beams]
    return hypotheses[0][1]


def naive_fill(model, text, order=None, search=greedy_span):
    """What fills each blank of a text, from left to right: lists of token ids."""
    context, blanks = context_of(text)
    done = []
    for number in order or range(len(blanks)):
        done.append((blanks[number], search(model, context, done, blanks[number])))
    return [tokens for _, tokens in sorted(done)]
