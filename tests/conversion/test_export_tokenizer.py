"""The tokenizer of an exported folder: plain, read alike where MiniLLM is not there, and nothing comes with it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from cli_cases import MIXED_TEXT, python_source, small_model
from conversion_cases import save_native
from transformers import AutoTokenizer, LlamaTokenizer, PreTrainedTokenizerFast, pipeline

from minillm import MiniLLMTokenizer
from minillm.conversion import ConversionError, convert, detect, export
from minillm.tokenization.tokenization_minillm import SUBWORD_MODELS

CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "the reader returns 你好"},
    {"role": "assistant", "content": "a value"},
]
TEXTS = [
    MIXED_TEXT,
    "",
    "  the reader\t returns\n\n  42 values  ",
    "a [MASK] b [gMASK][sMASK]<|startofpiece|>c<|endofpiece|><|user|>d <|endoftext|> new_word <new> end",
    "naïve \u2581 \ufdd0 \U0001f600",
]

# What somebody without MiniLLM does with the folder; prints what it found as one line of JSON.
STRANGER = """
import json, sys
sys.modules["minillm"] = None
from transformers import AutoTokenizer, pipeline
folder, texts, chat = sys.argv[1], json.loads(sys.argv[2]), json.loads(sys.argv[3])
tokenizer = AutoTokenizer.from_pretrained(folder)
encoded = [dict(tokenizer(text)) for text in texts]
ids = [one["input_ids"] for one in encoded]
named = ["pad_token_id", "bos_token_id", "eos_token_id", "mask_token_id", "gmask_token_id", "sop_token_id"]
options = {"return_dict": True, "return_assistant_tokens_mask": True}
written = pipeline("text-generation", model=folder)("the reader", max_new_tokens=5, do_sample=False)
print(json.dumps({
    "class": f"{type(tokenizer).__module__}.{type(tokenizer).__name__}",
    "encoded": encoded,
    "decoded": [tokenizer.decode(row) for row in ids],
    "skipped": [tokenizer.decode(row, skip_special_tokens=True) for row in ids],
    "special": sorted(tokenizer.all_special_ids),
    "named": [getattr(tokenizer, name) for name in named],
    "length": len(tokenizer),
    "chat": dict(tokenizer.apply_chat_template(chat, **options)),
    "prompt": tokenizer.apply_chat_template(chat[:2], add_generation_prompt=True, tokenize=False),
    "padded": tokenizer(texts, padding=True)["input_ids"],
    "written": written[0]["generated_text"],
}))
"""


def as_a_stranger(folder):
    command = [sys.executable, "-c", STRANGER, str(folder), json.dumps(TEXTS), json.dumps(CHAT)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def train(kind="byte_bpe"):
    texts = [python_source(number) for number in range(10)] + [MIXED_TEXT]
    tokenizer = MiniLLMTokenizer.train_from_iterator(texts, vocab_size=700, model=kind, show_progress=False)
    tokenizer.add_tokens(["new_word"])
    tokenizer.add_special_tokens({"extra_special_tokens": ["<new>"]}, replace_extra_special_tokens=False)
    return tokenizer


def save_model(folder, tokenizer, **fields):
    model = small_model(tokenizer, **fields)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model


def require_no_code(folder):
    assert not list(folder.rglob("*.py"))
    for file in folder.rglob("*.json"):
        assert "auto_map" not in file.read_text("utf-8")


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=[] if kind == "byte_bpe" else [pytest.mark.slow]) for kind in SUBWORD_MODELS]
)
def test_a_stranger_reads_text_as_minillm_does(kind, tmp_path):
    tokenizer = train(kind)
    model = save_model(tmp_path / "ours", tokenizer)
    export(tmp_path / "ours", tmp_path / "llama", "llama")
    require_no_code(tmp_path / "llama")
    settings = json.loads((tmp_path / "llama" / "tokenizer_config.json").read_text("utf-8"))
    assert settings["tokenizer_class"] == "PreTrainedTokenizerFast"
    found = as_a_stranger(tmp_path / "llama")
    assert found["class"].startswith("transformers.")
    encoded = [dict(tokenizer(text)) for text in TEXTS]
    assert found["encoded"] == encoded
    ids = [one["input_ids"] for one in encoded]
    assert found["decoded"] == [tokenizer.decode(row) for row in ids]
    assert found["skipped"] == [tokenizer.decode(row, skip_special_tokens=True) for row in ids]
    assert found["special"] == sorted(tokenizer.all_special_ids) and found["length"] == len(tokenizer)
    named = ("pad_token_id", "bos_token_id", "eos_token_id", "mask_token_id", "gmask_token_id", "sop_token_id")
    assert found["named"] == [getattr(tokenizer, name) for name in named]
    options = {"return_dict": True, "return_assistant_tokens_mask": True}
    assert found["chat"] == dict(tokenizer.apply_chat_template(CHAT, **options))
    assert found["prompt"] == tokenizer.apply_chat_template(CHAT[:2], add_generation_prompt=True, tokenize=False)
    assert found["padded"] == tokenizer(TEXTS, padding=True)["input_ids"]
    here = pipeline("text-generation", model=model, tokenizer=tokenizer)
    assert found["written"] == here("the reader", max_new_tokens=5, do_sample=False)[0]["generated_text"]


def test_several_chat_templates_come_along(tmp_path):
    tokenizer = train()
    tokenizer.chat_template = {"default": "{{ messages[0]['content'] }}", "shout": "{{ messages[0]['content'] }}!"}
    save_model(tmp_path / "ours", tokenizer)
    export(tmp_path / "ours", tmp_path / "llama", "llama")
    found = AutoTokenizer.from_pretrained(tmp_path / "llama")
    assert found.chat_template == tokenizer.chat_template
    convert(tmp_path / "llama", tmp_path / "again")
    assert AutoTokenizer.from_pretrained(tmp_path / "again").chat_template == tokenizer.chat_template


# --- what is not taken along ---


def edit_settings(folder, **changes):
    file = folder / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text("utf-8")) | changes), "utf-8")


def test_foreign_code_is_left_out_and_said_so(tmp_path, caplog):
    """A class of the folder's own: what `tokenizer.json` says stays, and no code is run."""
    tokenizer = train()
    save_model(tmp_path / "ours", tokenizer)
    (tmp_path / "ours" / "mine.py").write_text("raise SystemExit('the code ran')", "utf-8")
    edit_settings(tmp_path / "ours", tokenizer_class="Mine", auto_map={"AutoTokenizer": [None, "mine.Mine"]})
    export(tmp_path / "ours", tmp_path / "llama", "llama")
    require_no_code(tmp_path / "llama")
    assert "(Mine) was left out" in caplog.text
    assert AutoTokenizer.from_pretrained(tmp_path / "llama")(MIXED_TEXT) == tokenizer(MIXED_TEXT)


def test_a_tokenizer_that_is_code_alone_is_left_out_whole(tmp_path, caplog):
    save_model(tmp_path / "ours", train())
    (tmp_path / "ours" / "tokenizer.json").unlink()
    (tmp_path / "ours" / "tokenizer.model").write_bytes(b"whatever")
    edit_settings(tmp_path / "ours", tokenizer_class="Mine", auto_map={"AutoTokenizer": ["mine.Mine", None]})
    export(tmp_path / "ours", tmp_path / "llama", "llama")
    assert "was left out" in caplog.text
    names = {path.name for path in (tmp_path / "llama").iterdir()}
    assert names == {"config.json", "model.safetensors", "generation_config.json"}


def test_a_stock_tokenizer_is_copied_as_it_is(tmp_path):
    tokenizer = train()
    stock = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, eos_token=tokenizer.eos_token)
    small_model(tokenizer).save_pretrained(tmp_path / "ours")
    stock.save_pretrained(tmp_path / "ours")
    export(tmp_path / "ours", tmp_path / "llama", "llama")
    require_no_code(tmp_path / "llama")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "llama" / name).read_bytes() == (tmp_path / "ours" / name).read_bytes()


def test_the_stock_llama_tokenizer_is_read_as_before(tmp_path):
    """transformers builds it anew from its vocabulary, and chooses the class by the config beside it."""
    pieces = ["<unk>", "<s>", "</s>", "\u2581", "a", "b", "c", "\u2581a", "ab", "\u2581ab"]
    vocab = {piece: number for number, piece in enumerate([*pieces, *(f"<0x{byte:02X}>" for byte in range(256))])}
    stock = LlamaTokenizer(vocab=vocab, merges=[("\u2581", "a"), ("a", "b"), ("\u2581a", "b")])
    small_model(stock).save_pretrained(tmp_path / "ours")
    stock.save_pretrained(tmp_path / "ours")
    expected = AutoTokenizer.from_pretrained(tmp_path / "ours")
    export(tmp_path / "ours", tmp_path / "llama", "llama")
    found = AutoTokenizer.from_pretrained(tmp_path / "llama")
    assert type(found) is type(expected) is LlamaTokenizer
    assert [found(text) for text in TEXTS] == [expected(text) for text in TEXTS]


@pytest.mark.parametrize(
    "folder", sorted((Path(__file__).parents[1] / "families").iterdir()), ids=lambda path: path.name
)
def test_families_that_transformers_lacks_get_a_plain_tokenizer_too(folder, tmp_path):
    convert(folder, tmp_path / "ours")
    train().save_pretrained(tmp_path / "ours")
    raw = json.loads((folder / "config.json").read_text("utf-8"))
    export(tmp_path / "ours", tmp_path / "back", detect(raw | {"_name_or_path": folder.name}).name)
    require_no_code(tmp_path / "back")
    assert PreTrainedTokenizerFast.from_pretrained(tmp_path / "back")(MIXED_TEXT) == train()(MIXED_TEXT)


def test_a_tokenizer_that_reads_otherwise_is_refused(tmp_path, monkeypatch):
    save_model(tmp_path / "ours", train())
    other = train("unigram")
    monkeypatch.setattr("minillm.conversion.carried_files.MiniLLMTokenizer.from_pretrained", lambda *_, **__: other)
    with pytest.raises(ConversionError, match="the written tokenizer has another vocabulary"):
        export(tmp_path / "ours", tmp_path / "llama", "llama")
    assert [path.name for path in tmp_path.iterdir()] == ["ours"]


LINKED = ["tokenizer.json", "chat_template.jinja", "generation_config.json", "additional_chat_templates/more.jinja"]


def link_out(folder, name, secret):
    """Puts a link to a file elsewhere in the place of one of the folder's."""
    secret.write_text("{}", "utf-8")
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to(secret)


@pytest.mark.parametrize("name", LINKED)
def test_links_out_of_the_folder_are_refused(name, tmp_path):
    save_model(tmp_path / "ours", train())
    link_out(tmp_path / "ours", name, tmp_path / "secret.txt")
    with pytest.raises(ConversionError, match=r"is a link out of its folder, to .*secret\.txt"):
        export(tmp_path / "ours", tmp_path / "llama", "llama")
    save_native(tmp_path / "native")
    link_out(tmp_path / "native", name, tmp_path / "secret.txt")
    with pytest.raises(ConversionError, match=r"is a link out of its folder, to .*secret\.txt"):
        convert(tmp_path / "native", tmp_path / "mine")
    assert {path.name for path in tmp_path.iterdir()} == {"ours", "native", "secret.txt"}


def test_links_inside_the_folder_and_of_the_hubs_cache_are_followed(tmp_path):
    """The cache holds a snapshot as links to blobs beside it."""
    tokenizer = train()
    save_model(tmp_path / "ours", tokenizer)
    blobs, snapshot = tmp_path / "models--a--b" / "blobs", tmp_path / "models--a--b" / "snapshots" / "rev"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for number, file in enumerate(sorted((tmp_path / "ours").iterdir())):
        file.rename(blobs / str(number))
        (snapshot / file.name).symlink_to(f"../../blobs/{number}")
    export(snapshot, tmp_path / "llama", "llama")
    assert not any(path.is_symlink() for path in (tmp_path / "llama").iterdir())
    assert AutoTokenizer.from_pretrained(tmp_path / "llama")(MIXED_TEXT) == tokenizer(MIXED_TEXT)


@pytest.mark.slow
@pytest.mark.parametrize("reference", ["/tmp/elsewhere.Mine", "../secret.Mine", "sub/mine.Mine"])
def test_code_outside_the_folder_is_not_copied(reference, tmp_path):
    save_native(tmp_path / "native")
    (tmp_path / "secret.py").write_text("", "utf-8")
    reference = reference.replace("/tmp", str(tmp_path))
    (tmp_path / "elsewhere.py").write_text("", "utf-8")
    settings = {"auto_map": {"AutoTokenizer": [reference, None]}}
    (tmp_path / "native" / "tokenizer_config.json").write_text(json.dumps(settings), "utf-8")
    convert(tmp_path / "native", tmp_path / "ours")
    assert not {"secret.py", "elsewhere.py", "mine.py"} & {path.name for path in tmp_path.rglob("ours/*.py")}


def test_convert_takes_along_what_the_tokenizers_code_imports(tmp_path):
    """Checkpoints of other families: their tokenizer loads from the converted folder, imports and all."""
    save_native(tmp_path / "native")
    train().save_pretrained(tmp_path / "native")
    for file in (tmp_path / "native").glob("*.py"):
        file.unlink()
    code = "from transformers import PreTrainedTokenizerFast\nfrom .pieces import SUFFIX\n\n\n"
    code += "class Mine(PreTrainedTokenizerFast):\n    suffix = SUFFIX\n"
    (tmp_path / "native" / "mine.py").write_text(code, "utf-8")
    (tmp_path / "native" / "pieces.py").write_text("from .more import SUFFIX\n", "utf-8")
    (tmp_path / "native" / "more.py").write_text("SUFFIX = 'seen'\n", "utf-8")
    (tmp_path / "native" / "unrelated.py").write_text("raise SystemExit\n", "utf-8")
    edit_settings(tmp_path / "native", tokenizer_class="Mine", auto_map={"AutoTokenizer": [None, "mine.Mine"]})
    convert(tmp_path / "native", tmp_path / "ours")
    assert AutoTokenizer.from_pretrained(tmp_path / "ours", trust_remote_code=True).suffix == "seen"
    assert not (tmp_path / "ours" / "unrelated.py").exists()
