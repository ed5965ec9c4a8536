"""The templates that come along, held to what others render for the same families."""

import json
from pathlib import Path

import pytest
from chat_cases import TEMPLATES_OF_TRL, TWO_TURNS, WITH_SYSTEM, chat_tokenizer

from minillm.data import CHAT_TEMPLATES, CorpusError, chat_template
from minillm.data.chat_templates import FOLDER

# Written by FastChat's `conversation.py`, or as the source of each says; never by our own templates.
REFERENCES = json.loads(Path(__file__).with_name("chat_references.json").read_text("utf-8"))


def render(name, messages, **options):
    return chat_tokenizer().apply_chat_template(messages, chat_template=chat_template(name), tokenize=False, **options)


def test_each_file_is_a_family():
    assert {path.stem for path in FOLDER.glob("*.jinja")} == set(CHAT_TEMPLATES)
    assert {case["template"] for case in REFERENCES} == set(CHAT_TEMPLATES) - {"llama-3"}


def test_the_page_lists_them():
    ends = {"eos": "`eos_token`", "token": "a token of the family", "": "nothing"}
    rows = [f"| `{name}` | {one.source} | {ends[one.ends]} |" for name, one in CHAT_TEMPLATES.items()]
    page = (Path(__file__).parents[2] / "docs" / "data.md").read_text("utf-8")
    assert "\n".join(rows) in page


@pytest.mark.parametrize("case", REFERENCES, ids=lambda case: f"{case['template']}-{len(case['messages'])}")
def test_prompts_are_those_of_the_release(case):
    assert render(case["template"], case["messages"], add_generation_prompt=True) == case["prompt"]


@pytest.mark.parametrize("messages", [TWO_TURNS, WITH_SYSTEM, WITH_SYSTEM[:2]], ids=["two", "system", "one"])
@pytest.mark.parametrize("opened", [False, True])
@pytest.mark.parametrize(("ours", "theirs"), [("llama-3", "llama3"), ("chatml", "qwen2_5")])
def test_templates_equal_those_of_trl(ours, theirs, opened, messages):
    if ours == "chatml" and messages is TWO_TURNS:
        messages = WITH_SYSTEM  # Qwen would put in its own.
    theirs = (TEMPLATES_OF_TRL / f"{theirs}.jinja").read_text("utf-8")
    options = {"tokenize": False, "add_generation_prompt": opened}
    expected = chat_tokenizer().apply_chat_template(messages, chat_template=theirs, **options)
    assert render(ours, messages, add_generation_prompt=opened) == expected


def test_answers_of_alpaca_end_as_in_its_training():
    user, assistant = {"role": "user", "content": "Name a color."}, {"role": "assistant", "content": "Red."}
    prompt = render("alpaca", [user], add_generation_prompt=True)
    assert render("alpaca", [user, assistant]) == prompt + "Red.</s>"
    # build_dataset.py of Chinese-LLaMA-Alpaca joins "### Response: " and the output.
    assert render("chinese-alpaca", [user, assistant]).endswith("### Response: Red.</s>")


def test_tools_of_glm_4_stand_in_a_system_message():
    tool = {"type": "function", "function": {"name": "clock", "description": "Tells the time."}}
    told = render("glm-4", TWO_TURNS[:1], tools=[tool], add_generation_prompt=True)
    assert told.startswith("[gMASK]<sop><|system|>\n你是一个名为 ChatGLM 的人工智能助手。")
    assert (
        '# 可用工具\n\n## clock\n\n{\n    "name": "clock",\n    "description": "Tells the time."\n}\n在调用上述函数时'
        in told
    )
    assert told.endswith("<|user|>\nWhere is Peking?<|assistant|>")


def test_a_template_may_be_a_file(tmp_path):
    (tmp_path / "my.jinja").write_text("{{ messages }}", "utf-8")
    assert chat_template(tmp_path / "my.jinja") == "{{ messages }}"
    (tmp_path / "bytes.jinja").write_bytes(b"\xff")
    with pytest.raises(CorpusError, match=r"bytes.jinja is not UTF-8 text \(byte 0\)"):
        chat_template(tmp_path / "bytes.jinja")
    with pytest.raises(
        CorpusError, match=r"chat template lama-2 cannot be read \(No such file.*one of the families alpaca"
    ):
        chat_template("lama-2")
