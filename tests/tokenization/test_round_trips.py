"""The tokenizer: round trips, named tokens, saving and loading, training and its refusals."""

import copy
import json
import pickle
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tokenizer_cases import CHINESE, EXACT, GLM_NAMES, MODELS, ROUND_TRIPS, TEXTS
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from minillm.tokenization import (
    added_tokens,
    glm_layout,
    literal_text,
    tokenization_minillm,
    training_text,
    turn_tokens,
)
from minillm.tokenization.tokenization_minillm import MiniLLMTokenizer

CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "你好 \n"},
    {"role": "assistant", "content": "  Hello\n😀\u2581"},
    {"role": "user", "content": "Bye"},
    {"role": "assistant", "content": "<0x41> 再见"},
]


@pytest.mark.parametrize("text", ROUND_TRIPS.values(), ids=ROUND_TRIPS.keys())
def test_text_comes_back_exactly(exact_tokenizer, text):
    ids = exact_tokenizer.encode(text)
    assert exact_tokenizer.decode(ids) == text
    assert exact_tokenizer.unk_token_id not in ids


def test_random_unicode_comes_back_exactly(exact_tokenizer):
    seed = random.SystemRandom().randrange(2**32)
    print(f"seed {seed}")
    rng = random.Random(seed)
    ranges = [(0, 0x80), (0x4E00, 0xA000), (0, 0xD800), (0xE000, 0x110000), (0x20, 0x21), (0x2581, 0x2582)]
    ranges += [(0xFDD0, 0xFDD1), (0x30, 0x32), (0x0A, 0x0B)]
    texts = ["".join(chr(rng.randrange(*rng.choice(ranges))) for _ in range(rng.randrange(40))) for _ in range(500)]
    assert exact_tokenizer.batch_decode(exact_tokenizer(texts)["input_ids"]) == texts


@pytest.mark.parametrize(
    ("model", "options"), [*((model, {}) for model in EXACT), ("sentencepiece_bpe", {"limit_alphabet": 3})], ids=str
)
def test_blanks_come_back_from_a_tokenizer_of_texts_without_any(model, options):
    trained = MiniLLMTokenizer.train_from_iterator(
        CHINESE * 9, vocab_size=420, model=model, show_progress=False, **options
    )
    again = trained.train_new_from_iterator(CHINESE * 9, 400, show_progress=False)
    for tokenizer in (trained, again):
        for text in (" ", "a b", "你好 再见", "\u2581 \ufdd0", " \n  "):
            assert tokenizer.decode(tokenizer.encode(text)) == text
        assert len(tokenizer.encode(" ")) == 1


def test_a_lone_surrogate_is_refused(tokenizer):
    with pytest.raises((TypeError, UnicodeError)):
        tokenizer.encode("a\ud800")


def test_concatenation_needs_no_prefix(exact_tokenizer):
    """No blank is put before a text, so a text split at a blank has the same ids as its parts."""
    parts = ["Hello", " world", " 你好"]
    assert exact_tokenizer.encode("".join(parts)) == [i for part in parts for i in exact_tokenizer.encode(part)]


def test_wordpiece_keeps_every_known_character_but_blanks(tokenizers):
    wordpiece = tokenizers["wordpiece"]
    text = f"{CHINESE[2]}  Return\n\tThe   JSON, {CHINESE[1]}"
    decoded = wordpiece.decode(wordpiece.encode(text))
    assert "".join(decoded.split()) == "".join(text.split())
    assert decoded == f"{' '.join(CHINESE[2])} Return The JSON , {' '.join(CHINESE[1])}"


def test_wordpiece_writes_unk_for_unknown_words_alone(tokenizers):
    wordpiece = tokenizers["wordpiece"]
    assert wordpiece.decode(wordpiece.encode("the 齉 the")) == "the <|unk|> the"


def test_subword_models_are_what_their_names_say(tokenizers):
    states = {model: json.loads(tokenizers[model].backend_tokenizer.to_str()) for model in MODELS}
    kinds = {model: (state["model"]["type"], state["model"].get("byte_fallback")) for model, state in states.items()}
    assert kinds == {
        "byte_bpe": ("BPE", False),
        "sentencepiece_bpe": ("BPE", True),
        "unigram": ("Unigram", True),
        "wordpiece": ("WordPiece", None),
    }
    for model in ("sentencepiece_bpe", "unigram"):
        assert tokenizers[model].tokenize("in the 😀") == ["in", "▁the", "▁", "<0xF0>", "<0x9F>", "<0x98>", "<0x80>"]
    assert tokenizers["byte_bpe"].tokenize(" the") == ["Ġthe"]


def test_digits_stand_alone(exact_tokenizer):
    assert exact_tokenizer.tokenize("1234") == ["1", "2", "3", "4"]


def test_vocabulary_has_the_size_asked_for(tokenizer):
    assert len(tokenizer) == tokenizer.vocab_size == 900
    assert sorted(tokenizer.get_vocab().values()) == list(range(900))


@pytest.mark.parametrize("model", ["byte_bpe", "sentencepiece_bpe"])
def test_training_bpe_again_gives_the_same_tokenizer(model, tokenizers):
    again = MiniLLMTokenizer.train_from_iterator(TEXTS, vocab_size=900, model=model, show_progress=False)
    assert again.backend_tokenizer.to_str() == tokenizers[model].backend_tokenizer.to_str()


def test_named_tokens_have_distinct_ids(tokenizer):
    names = ["pad_token", "bos_token", "eos_token", *GLM_NAMES]
    assert [getattr(tokenizer, f"{name}_id") for name in names] == list(range(8))
    assert [tokenizer.convert_tokens_to_ids(getattr(tokenizer, name)) for name in names] == list(range(8))
    assert tokenizer.extra_special_tokens == ["<|system|>", "<|user|>", "<|assistant|>"]
    assert len(set(tokenizer.all_special_ids)) == len(tokenizer.all_special_tokens)


def test_unk_stands_only_where_the_model_needs_it(tokenizers):
    assert {model: tokenizers[model].unk_token for model in MODELS} == {
        "byte_bpe": None,
        "sentencepiece_bpe": None,
        "unigram": "<|unk|>",
        "wordpiece": "<|unk|>",
    }


def test_special_tokens_are_never_split(tokenizer):
    for token in tokenizer.all_special_tokens:
        text = f"the{token}the"
        the = tokenizer.encode("the")
        assert tokenizer.encode(text) == [*the, tokenizer.convert_tokens_to_ids(token), *the]
        assert tokenizer.decode(tokenizer.encode(text), skip_special_tokens=True).replace(" ", "") == "thethe"


def test_special_tokens_as_plain_text(exact_tokenizer):
    """With `split_special_tokens` no subword piece may spell a special token's id."""
    text = "".join(exact_tokenizer.all_special_tokens)
    ids = exact_tokenizer.encode(text, split_special_tokens=True)
    assert not set(ids) & set(exact_tokenizer.all_special_ids)
    assert exact_tokenizer.decode(ids) == text


def test_encoding_adds_nothing(tokenizer):
    encoded = tokenizer("the 天")
    assert list(encoded) == ["input_ids", "attention_mask"]
    assert encoded["input_ids"] == tokenizer.encode("the 天", add_special_tokens=False)
    assert not set(encoded["input_ids"]) & set(tokenizer.all_special_ids)


@pytest.mark.parametrize("side", ["right", "left"])
def test_padding(tokenizer, side):
    short, long = tokenizer.encode("the"), tokenizer.encode("the the")
    arguments = {} if side == "right" else {"padding_side": side}
    batch = tokenizer(["the", "the the"], padding=True, **arguments)
    gap = len(long) - len(short)
    pad, mask = [0] * gap, [1] * len(short)
    assert batch["input_ids"] == [short + pad if side == "right" else pad + short, long]
    assert batch["attention_mask"] == [mask + pad if side == "right" else pad + mask, [1] * len(long)]


def test_a_token_that_is_not_set_is_none(tokenizers):
    bare = MiniLLMTokenizer(tokenizer_object=tokenizers["byte_bpe"].backend_tokenizer)
    assert bare.gmask_token is None and bare.gmask_token_id is None
    bare.gmask_token = "[gMASK]"
    assert bare.gmask_token_id == tokenizers["byte_bpe"].gmask_token_id


def test_new_named_tokens_can_be_added(tokenizers):
    tokenizer = copy.deepcopy(tokenizers["byte_bpe"])
    assert tokenizer.add_special_tokens({"sop_token": "<s>"}) == 1
    assert tokenizer.sop_token_id == 900 and tokenizer.encode("<s>") == [900]


def assert_same(loaded, tokenizer):
    assert loaded.get_vocab() == tokenizer.get_vocab()
    assert loaded.special_tokens_map == tokenizer.special_tokens_map
    assert loaded.extra_special_tokens == tokenizer.extra_special_tokens
    assert [getattr(loaded, f"{name}_id") for name in GLM_NAMES] == [3, 4, 5, 6, 7]
    for text in ROUND_TRIPS.values():
        assert loaded.encode(text) == tokenizer.encode(text)
        assert loaded.decode(loaded.encode(text)) == tokenizer.decode(tokenizer.encode(text))
    assert loaded.apply_chat_template(CHAT, tokenize=False) == tokenizer.apply_chat_template(CHAT, tokenize=False)


@pytest.mark.parametrize("loader", [MiniLLMTokenizer, AutoTokenizer], ids=["class", "auto"])
def test_save_and_load(tokenizer, loader, tmp_path):
    tokenizer("one text")  # the back end remembers the padding of its last call, and saves it
    tokenizer.save_pretrained(tmp_path / "first")
    loaded = loader.from_pretrained(tmp_path / "first")
    assert type(loaded) is MiniLLMTokenizer
    assert_same(loaded, tokenizer)
    loaded.save_pretrained(tmp_path / "second")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        first, second = ((tmp_path / folder / name).read_text("utf-8") for folder in ("first", "second"))
        if name == "tokenizer_config.json":
            # What a loader notes about where the files came from may differ.
            first, second = ({k: v for k, v in json.loads(s).items() if "local" not in k} for s in (first, second))
        assert first == second, name
    assert {path.suffix for path in (tmp_path / "first").iterdir()} <= {".json", ".jinja", ".py"}


def test_stock_class_reads_the_named_tokens(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    loaded = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    assert [getattr(loaded, f"{name}_id") for name in GLM_NAMES] == [3, 4, 5, 6, 7]


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda t: pickle.loads(pickle.dumps(t))], ids=["deepcopy", "pickle"]
)
def test_copies_are_equal(tokenizer, copied):
    assert_same(copied(tokenizer), tokenizer)


STRANGER = """
import json, sys
sys.modules["minillm"] = None
from transformers import AutoTokenizer
folder, text = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
tokenizer.save_pretrained(folder + "/again")
again = AutoTokenizer.from_pretrained(folder + "/again", trust_remote_code=True)
glm = ["mask_token_id", "gmask_token_id", "smask_token_id", "sop_token_id", "eop_token_id"]
print(json.dumps([[type(t).__name__, t.encode(text), [getattr(t, name) for name in glm]] for t in (tokenizer, again)]))
"""


@pytest.mark.slow
def test_the_flat_files_serve_a_stranger(tokenizers, tmp_path):
    """A saved folder loads in a process that cannot import the plug-in, and saves again."""
    tokenizer = tokenizers["unigram"]
    tokenizer.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text("utf-8"))
    config["auto_map"] = {"AutoTokenizer": [None, "tokenization_minillm.MiniLLMTokenizer"]}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config), "utf-8")
    text = ROUND_TRIPS["mixed"] + ROUND_TRIPS["space-sign"]
    result = subprocess.run(
        [sys.executable, "-c", STRANGER, str(tmp_path), text],
        capture_output=True,
        text=True,
        encoding="utf-8",
        env={"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1", "PATH": "", "PYTHONUTF8": "1"},
    )
    assert result.returncode == 0, result.stderr
    expected = ["MiniLLMTokenizer", tokenizer.encode(text), [3, 4, 5, 6, 7]]
    assert json.loads(result.stdout.splitlines()[-1]) == [expected, expected]


def test_the_flat_files_stand_alone():
    """Only the standard library, tokenizers and transformers are imported, and files of the same room."""
    roots = set()
    beside = (added_tokens, glm_layout, literal_text, training_text, turn_tokens)
    for module in (tokenization_minillm, *beside):
        lines = Path(module.__file__).read_text("utf-8").splitlines()
        names = [line.split()[1] for line in lines if line.startswith(("import ", "from "))]
        roots |= {name for name in names if name.partition(".")[0] not in sys.stdlib_module_names}
    travelling = {module.__name__ for module in beside}
    assert {root.partition(".")[0] for root in roots - travelling} == {"tokenizers", "transformers"}


def test_no_private_method_of_the_base_class_is_overridden():
    added = [*vars(MiniLLMTokenizer), *vars(glm_layout.GLMInputsMixin), *vars(added_tokens.AddedTokensMixin)]
    own = {name for name in added if name.startswith("_") and not name.startswith("__")}
    assert not {name for name in own if hasattr(PreTrainedTokenizerFast, name)} - {"_auto_class"}
    assert "__init__" not in vars(MiniLLMTokenizer)


@pytest.mark.parametrize("loader", [MiniLLMTokenizer, AutoTokenizer], ids=["class", "auto"])
@pytest.mark.parametrize("damage", ["truncated", "not-json", "empty", "wrong-content"])
def test_a_damaged_tokenizer_file_is_named(tokenizers, loader, damage, tmp_path):
    tokenizers["byte_bpe"].save_pretrained(tmp_path)
    path = tmp_path / "tokenizer.json"
    text = path.read_text("utf-8")
    path.write_text(
        {"truncated": text[: len(text) // 2], "not-json": "<html>", "empty": "", "wrong-content": "{}"}[damage],
        "utf-8",
    )
    with pytest.raises(ValueError, match=r"tokenizer\.json is damaged"):
        loader.from_pretrained(tmp_path)


def test_a_damaged_config_file_is_named(tokenizers, tmp_path):
    tokenizers["byte_bpe"].save_pretrained(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": ', "utf-8")
    with pytest.raises(ValueError, match=r"tokenizer_config\.json is damaged"):
        MiniLLMTokenizer.from_pretrained(tmp_path)


def test_a_missing_tokenizer_file_is_named(tokenizers, tmp_path):
    tokenizers["byte_bpe"].save_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"tokenizer\.json is missing"):
        MiniLLMTokenizer.from_pretrained(tmp_path)


def test_other_loading_errors_stay_as_they_are(tokenizers, tmp_path):
    tokenizers["byte_bpe"].save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="Padding side"):
        MiniLLMTokenizer.from_pretrained(tmp_path, padding_side="middle")


@pytest.mark.parametrize("model", MODELS)
def test_train_new_from_iterator_keeps_the_rules(model, tokenizers):
    old = tokenizers[model]
    new = old.train_new_from_iterator(CHINESE * 20 + ["the quick brown fox"] * 20, 500, show_progress=False)
    assert [getattr(new, f"{name}_id") for name in GLM_NAMES] == [3, 4, 5, 6, 7]
    assert new.extra_special_tokens == old.extra_special_tokens and new.chat_template == old.chat_template
    assert len(new) <= 500 and new.get_vocab() != old.get_vocab()
    if model in EXACT:
        for text in ROUND_TRIPS.values():
            assert new.decode(new.encode(text)) == text


@pytest.mark.slow
def test_encoding_costs_what_the_back_end_costs(tokenizers):
    tokenizer = tokenizers["byte_bpe"]
    text = "".join(TEXTS) * 4
    texts = [text[start : start + 4000] for start in range(0, len(text), 4000)]

    def ours():
        return tokenizer(texts)

    def raw():
        return [
            (encoding.ids, encoding.attention_mask) for encoding in tokenizer.backend_tokenizer.encode_batch(texts)
        ]

    times = {ours: [], raw: []}
    for _ in range(15):
        for function in times:
            start = time.perf_counter()
            function()
            times[function].append(time.perf_counter() - start)
    assert min(times[ours]) <= 1.05 * min(times[raw]), times
