"""Models whose vocabulary is extended: rows of new tokens, and what fine-tuning, saving and merging make of them."""

import copy

import peft
import pytest
import torch
from training_cases import collator_for, tiny_model
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BloomConfig,
    BloomForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PhiConfig,
    PhiForCausalLM,
)
from vocabulary_cases import CHINESE, ENGLISH, english_tokenizer

from minillm.head import NormHead
from minillm.tokenization import extend_vocabulary
from minillm.training import resize_for_vocabulary

LAYOUT = "minillm_sentencepiece_bpe"
SMALL = {"vocab_size": 502, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
MODELS = {
    "minillm-tied": lambda: tiny_model(vocab_size=502, tie_word_embeddings=True),
    "minillm-untied": lambda: tiny_model(vocab_size=502),
    "minillm-norm_head": lambda: tiny_model(vocab_size=502, norm_head=True),
    "llama-untied": lambda: LlamaForCausalLM(LlamaConfig(**SMALL, intermediate_size=16)),
    "llama-tied": lambda: LlamaForCausalLM(LlamaConfig(**SMALL, intermediate_size=16, tie_word_embeddings=True)),
    "bloom-tied": lambda: BloomForCausalLM(BloomConfig(vocab_size=502, hidden_size=16, n_layer=1, n_head=2)),
    "gpt2-tied": lambda: GPT2LMHeadModel(GPT2Config(vocab_size=502, n_embd=16, n_layer=1, n_head=2)),
    "phi-bias": lambda: PhiForCausalLM(PhiConfig(**SMALL, intermediate_size=16)),
}


@pytest.fixture(scope="module")
def tokenizers():
    old = english_tokenizer(LAYOUT)
    assert len(old) == 502
    return old, extend_vocabulary(old, CHINESE, num_new_tokens=30)


def make(name, seed=0):
    torch.manual_seed(seed)
    model = MODELS[name]().eval()
    if getattr(model.lm_head, "bias", None) is not None:
        torch.nn.init.normal_(model.lm_head.bias)
    return model


def spelled(old, new, index):
    """The old ids of a new token, asked of the old tokenizer as of any text."""
    text = new.convert_ids_to_tokens(index).replace("\u2581", " ")
    return old.encode(text, add_special_tokens=False)


@pytest.mark.parametrize("name", MODELS)
def test_new_rows_are_means_of_the_pieces_that_spelled_them(name, tokenizers):
    old, new = tokenizers
    model = make(name)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    ids = resize_for_vocabulary(model, old, new)
    assert ids == list(range(502, 532)) and model.config.vocab_size == 532
    for key, tensor in model.state_dict().items():
        if tensor.shape == before[key].shape:
            assert torch.equal(tensor, before[key])
            continue
        assert tensor.shape == (532, *before[key].shape[1:]) and torch.equal(tensor[:502], before[key])
        for index in ids:
            rows = [before[key][part] for part in spelled(old, new, index)]
            if name == "minillm-norm_head" and key == "lm_head.weight":
                rows = [row / row.norm() for row in rows]
            assert (tensor[index] - sum(rows) / len(rows)).abs().max() < 1e-6
    assert (model.lm_head.weight is model.get_input_embeddings().weight) == name.endswith("-tied")
    assert isinstance(model.lm_head, NormHead) == (name == "minillm-norm_head")
    grown = [key for key, tensor in model.state_dict().items() if tensor.shape != before[key].shape]
    assert len(grown) == (3 if name == "phi-bias" else 2)


@pytest.mark.parametrize("name", MODELS)
def test_old_text_gets_the_same_logits(name, tokenizers):
    old, new = tokenizers
    model = make(name)
    ids = torch.tensor([old.encode(ENGLISH[1])[:40]])
    with torch.no_grad():
        before = model(ids).logits
        resize_for_vocabulary(model, old, new)
        after = model(ids).logits
    assert after.shape[-1] == 532 and (after[..., :502] - before).abs().max() < 1e-6


def test_a_row_by_hand(tokenizers):
    old, new = tokenizers
    index = new.convert_tokens_to_ids("语")
    # U+8BED is E8 AF AD in UTF-8.
    parts = [old.convert_tokens_to_ids(piece) for piece in ("<0xE8>", "<0xAF>", "<0xAD>")]
    model = make("minillm-untied")
    table = model.get_input_embeddings().weight.detach().clone()
    resize_for_vocabulary(model, old, new)
    expected = (table[parts[0]] + table[parts[1]] + table[parts[2]]) / 3
    assert (model.get_input_embeddings().weight[index] - expected).abs().max() < 1e-7


def test_rows_of_a_padded_table_are_used_first(tokenizers):
    old, new = tokenizers
    model = tiny_model(vocab_size=512)
    assert resize_for_vocabulary(model, old, new) == list(range(502, 532)) and model.config.vocab_size == 532
    larger = tiny_model(vocab_size=600)
    before = larger.get_input_embeddings().weight.detach().clone()
    resize_for_vocabulary(larger, old, new)
    after = larger.get_input_embeddings().weight.detach()
    assert larger.config.vocab_size == 600
    assert torch.equal(after[532:], before[532:]) and torch.equal(after[:502], before[:502])
    assert not torch.equal(after[502:532], before[502:532])


def test_the_number_of_rows_can_be_rounded_up(tokenizers):
    model = tiny_model(vocab_size=502)
    resize_for_vocabulary(model, *tokenizers, pad_to_multiple_of=64)
    assert model.config.vocab_size == 576 == model.lm_head.weight.shape[0]


def test_half_precision_is_averaged_in_full(tokenizers):
    old, new = tokenizers
    model = tiny_model(vocab_size=502).to(torch.bfloat16)
    table = model.get_input_embeddings().weight.detach().clone()
    for index in resize_for_vocabulary(model, old, new):
        row = model.get_input_embeddings().weight[index]
        expected = table[spelled(old, new, index)].double().mean(0)
        assert row.dtype == torch.bfloat16 and (row.double() - expected).abs().max() <= 2**-8 * expected.abs().max()


def test_ordinary_new_tokens_begin_as_their_text():
    old = english_tokenizer("gpt2")
    new = copy.deepcopy(old)
    new.add_special_tokens({"extra_special_tokens": ["<|the end|>"]}, replace_extra_special_tokens=False)
    model = tiny_model(vocab_size=len(old))
    table = model.get_input_embeddings().weight.detach().clone()
    assert resize_for_vocabulary(model, old, new) == [len(old)]
    expected = table[old.encode("<|the end|>")].mean(0)
    assert (model.get_input_embeddings().weight[len(old)] - expected).abs().max() < 1e-6


def test_bad_input_is_refused_and_changes_nothing(tokenizers):
    old, new = tokenizers
    small = tiny_model(vocab_size=400)
    with pytest.raises(ValueError, match="old_tokenizer has ids up to 501, but the model's embedding only 400 rows"):
        resize_for_vocabulary(small, old, new)
    model = tiny_model(vocab_size=502)
    with pytest.raises(ValueError, match="does not extend the old one"):
        resize_for_vocabulary(model, new, old)
    with pytest.raises(TypeError, match="new_tokenizer must be a fast tokenizer"):
        resize_for_vocabulary(model, old, "new")
    assert model.config.vocab_size == 502 and small.config.vocab_size == 400
    adapted = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM"))
    with pytest.raises(ValueError, match="the model has adapters"):
        resize_for_vocabulary(adapted, old, new)


# Fine-tuning: the new rows and LoRA, from the resized model to the merged one in a folder.

WAYS = {
    "trainable_token_indices": lambda ids, tied: {"trainable_token_indices": ids},
    "both_tables": lambda ids, tied: {"trainable_token_indices": {"embed_tokens": ids, "lm_head": ids}},
    "modules_to_save": lambda ids, tied: (
        {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}
        if tied
        else {"modules_to_save": ["embed_tokens", "lm_head"]}
    ),
}
CASES = [
    ("trainable_token_indices", "minillm-tied"),
    ("trainable_token_indices", "minillm-untied"),
    ("both_tables", "minillm-untied"),
    ("modules_to_save", "minillm-tied"),
    ("modules_to_save", "minillm-untied"),
    ("modules_to_save", "minillm-norm_head"),
    ("trainable_token_indices", "llama-tied"),
    ("modules_to_save", "llama-untied"),
]


def train(model, batch, steps=6):
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.02)
    found = []
    for _ in range(steps):
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(loss.item())
    return found


def logits(model, batch):
    with torch.no_grad():
        return model.eval()(batch["input_ids"], attention_mask=batch["attention_mask"]).logits


@pytest.mark.parametrize(("way", "name"), CASES, ids=["-".join(case) for case in CASES])
def test_lora_and_new_embeddings_survive_saving_and_merging(way, name, tokenizers, tmp_path):
    old, new = tokenizers
    base = make(name)
    ids = resize_for_vocabulary(base, old, new)
    base.save_pretrained(tmp_path / "base")
    before = {key: tensor.clone() for key, tensor in base.state_dict().items()}
    tied = name.endswith("-tied")
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj", "v_proj"], **WAYS[way](ids, tied))
    model = peft.get_peft_model(base, config)
    batch = collator_for("causal", packing=False)([new.encode(text)[:32] for text in CHINESE])
    batch = {key: batch[key] for key in ("input_ids", "attention_mask", "labels")}
    assert set(ids) & set(batch["input_ids"].flatten().tolist())
    losses = train(model, batch)
    assert losses[-1] < losses[0] - 0.1
    found = logits(model, batch)
    model.save_pretrained(tmp_path / "adapter")

    reloaded = peft.PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(tmp_path / "base"), tmp_path / "adapter"
    )
    assert (logits(reloaded, batch) - found).abs().max() < 1e-6
    merged = reloaded.merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    new.save_pretrained(tmp_path / "merged")
    published = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert (logits(published, batch) - found).abs().max() < 1e-5
    assert len(AutoTokenizer.from_pretrained(tmp_path / "merged")) == published.config.vocab_size == 532
    assert (published.lm_head.weight is published.get_input_embeddings().weight) == tied
    for key, tensor in published.state_dict().items():
        if key.endswith(("embed_tokens.weight", "lm_head.weight")):
            changed = (tensor != before[key]).any(-1).nonzero().flatten().tolist()
            trained = way != "trainable_token_indices" or tied or "embed" in key
            assert bool(set(changed) & set(ids)) == trained
            if way != "modules_to_save":
                assert set(changed) <= set(ids)
