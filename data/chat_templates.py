"""Chat templates of model families, as data: how their releases write a conversation.

The templates are files in `templates/`. None has `{% generation %}`, which other programs that read chat templates do
not know: where answers begin and end is found from renderings (see `conversations.py`).
"""

from pathlib import Path
from typing import NamedTuple

from minillm.data.containers import CorpusError

FOLDER = Path(__file__).with_name("templates")


class ChatTemplate(NamedTuple):
    """Where a template comes from, and what it writes.

    Attributes:
        source: the release that it is held to.
        ends: what ends an answer: "eos" if the template writes the tokenizer's `eos_token` there, "token" if it is one
            of `tokens`, or "" if it writes nothing (the release appends the end token to an answer when it trains).
        tokens: strings that are special tokens in the release's tokenizer.
        apart: prompts end with a mark that tokenizers join with an answer's first: they are tokenized apart.
    """

    source: str
    ends: str
    tokens: tuple[str, ...] = ()
    apart: bool = False


GLM_ROLES = ("<|system|>", "<|user|>", "<|assistant|>", "<|observation|>")

CHAT_TEMPLATES = {
    "alpaca": ChatTemplate("Stanford Alpaca, train.py; more turns the same way", "eos", apart=True),
    "baichuan": ChatTemplate("Baichuan-13B-Chat, generation_utils.py", "", ("<reserved_102>", "<reserved_103>")),
    "baichuan2": ChatTemplate(
        "Baichuan2-Chat, generation_utils.py and fine-tune.py", "", ("<reserved_106>", "<reserved_107>")
    ),
    "bloomz": ChatTemplate("BLOOMZ, its card: the prompt as it is", "eos"),
    "chatglm2": ChatTemplate("ChatGLM2-6B, tokenization_chatglm.py", "", ("[gMASK]", "sop"), apart=True),
    "chatglm3": ChatTemplate(
        "ChatGLM3-6B, the chat template of its tokenizer", "token", ("[gMASK]", "sop", *GLM_ROLES)
    ),
    "chatml": ChatTemplate(
        "ChatML, as Qwen and SmolLM2 write it, without their system messages", "token", ("<|im_start|>", "<|im_end|>")
    ),
    "chinese-alpaca": ChatTemplate(
        "Chinese-LLaMA-Alpaca, build_dataset.py; more turns the same way", "eos", apart=True
    ),
    "chinese-alpaca-2": ChatTemplate("Chinese-LLaMA-Alpaca-2: Llama-2's with a system message of its own", "eos"),
    "glm-4": ChatTemplate(
        "GLM-4-9B-Chat, the chat template of its tokenizer; of tools functions only",
        "token",
        ("[gMASK]", "<sop>", *GLM_ROLES),
    ),
    "llama-2": ChatTemplate("Llama-2-Chat, the chat template of its tokenizer", "eos"),
    "llama-3": ChatTemplate(
        "Llama-3-Instruct, the chat template of its tokenizer",
        "token",
        ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    ),
    "vicuna": ChatTemplate("Vicuna 1.1 and 1.5, FastChat", "eos"),
    "ziya": ChatTemplate("Ziya-LLaMA-13B, its card; more turns on lines of their own", "", apart=True),
}
"""The templates that come along, by name."""


def chat_template(name: str | Path) -> str:
    """A chat template by the name of its family, or out of a file.

    Args:
        name: one of `CHAT_TEMPLATES`, or the path of a Jinja file.

    Raises:
        CorpusError: neither, or a file that cannot be read.
    """
    path = Path(name)
    if str(name) in CHAT_TEMPLATES and not path.is_file():
        return (FOLDER / f"{name}.jinja").read_text("utf-8")
    try:
        return path.read_text("utf-8")
    except UnicodeDecodeError as error:
        raise CorpusError(f"the chat template {path} is not UTF-8 text (byte {error.start})") from error
    except OSError as error:
        raise CorpusError(
            f"the chat template {path} cannot be read ({error.strerror or error}); give a Jinja file, or one of the "
            f"families {', '.join(CHAT_TEMPLATES)}"
        ) from error
