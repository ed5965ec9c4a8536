"""`minillm generate`: continue prompts, batched or streamed, and fill their blanks."""

import sys
from typing import Any, NamedTuple

import typer
from transformers import TextStreamer, set_seed

from minillm.cli.console import say
from minillm.cli.loading import best_device, load_model, load_tokenizer
from minillm.tokenization.glm_layout import GLMTokens, find_glm_tokens
from minillm.tokenization.literal_text import LiteralReading, read_literally
from minillm.training.put_back import random_states_kept


class Decoding(NamedTuple):
    """How tokens are chosen; a `temperature` of 0 is greedy."""

    max_new_tokens: int
    temperature: float
    top_p: float
    num_beams: int
    seed: int

    def options(self) -> dict[str, Any]:
        """The keywords of `generate()`.

        Raises:
            ValueError: `top_p` without sampling.
        """
        common = {"max_new_tokens": self.max_new_tokens, "num_beams": self.num_beams}
        if self.temperature > 0:
            return {**common, "do_sample": True, "temperature": self.temperature, "top_p": self.top_p}
        if self.top_p < 1.0:
            raise ValueError(f"--top-p {self.top_p} needs sampling: set --temperature above 0")
        return {**common, "do_sample": False}


@random_states_kept()
def run(model_name: str, prompts: list[str] | None, decoding: Decoding, stream: bool, special_tokens: bool) -> None:
    """Prints each prompt with its continuation, or with its blanks filled.

    The strings of special tokens in a prompt are text unless `special_tokens` has them read; blanks and start tokens
    of a model that fills blanks are read in any case.

    Raises:
        ValueError: no prompt or an empty one, streaming of several prompts, beams or blanks, `top_p` without sampling,
            or no model at the given place.
    """
    if not prompts and sys.stdin.isatty():
        say("waiting for prompts, one a line; Ctrl-D ends them")
    prompts = prompts or [line.rstrip("\r\n") for line in sys.stdin if line.strip()]
    if not prompts or not all(prompts):
        raise ValueError("no prompt: give some as arguments, or one per line on the standard input")
    if stream and (len(prompts) > 1 or decoding.num_beams > 1):
        raise ValueError("--stream prints one prompt without beams as it comes; give one prompt and no --num-beams")
    options = decoding.options()
    tokenizer = load_tokenizer(model_name, padding_side="left")
    model = load_model(model_name, allow_adapter=True).to(best_device())
    set_seed(decoding.seed)
    glm = glm_tokens(model, tokenizer)
    reading = read_prompts(tokenizer, prompts, glm, special_tokens)
    tokenizer, prompts = reading.tokenizer, [reading.hide(prompt) for prompt in prompts]
    blanked = [has_blank(glm, tokenizer, prompt) for prompt in prompts]
    if stream and blanked[0]:
        raise ValueError("--stream prints a continuation as it comes; a blank is filled before it is printed")
    if stream:
        inputs = tokenizer(prompts, return_tensors="pt").to(best_device())
        model.generate(**inputs, **options, streamer=TextStreamer(tokenizer, skip_special_tokens=True))
        return
    told = list(prompts)
    for filled in (True, False):
        chosen = [number for number, blank in enumerate(blanked) if blank == filled]
        if chosen:
            write = fill if filled else continue_texts
            texts = write(model, tokenizer, [prompts[number] for number in chosen], options)
            for number, text in zip(chosen, texts, strict=True):
                told[number] = text
    for text in told:
        # Not through rich, which would expand tabs and drop control characters.
        typer.echo(reading.reveal(text))


def glm_tokens(model: Any, tokenizer: Any) -> GLMTokens | None:
    """The tokens of a model that fills blanks; None for another."""
    if not hasattr(model, "fill") or model.config.attention_type != "prefix":
        return None
    try:
        return find_glm_tokens(tokenizer, model.config)
    except ValueError:
        return None


def read_prompts(tokenizer: Any, prompts: list[str], glm: GLMTokens | None, special_tokens: bool) -> LiteralReading:
    """How to read the prompts: all special tokens in them, or only GLM's blanks and start token."""
    if special_tokens:
        return LiteralReading(tokenizer, (), {})
    kept = [] if glm is None else tokenizer.convert_ids_to_tokens([*glm.blanks, glm.sop])
    return read_literally(tokenizer, "\n".join(prompts), keep=kept)


def has_blank(glm: GLMTokens | None, tokenizer: Any, prompt: str) -> bool:
    """Whether a prompt holds a blank to fill: one before a start token is continued by `generate()` itself."""
    if glm is None:
        return False
    ids = tokenizer(prompt)["input_ids"]
    return glm.sop not in ids and not set(glm.blanks).isdisjoint(ids)


def fill(model: Any, tokenizer: Any, prompts: list[str], options: dict[str, Any]) -> list[str]:
    return model.fill(prompts, tokenizer, **options).texts


def continue_texts(model: Any, tokenizer: Any, prompts: list[str], options: dict[str, Any]) -> list[str]:
    inputs = tokenizer(prompts, return_tensors="pt", padding=len(prompts) > 1).to(model.device)
    return tokenizer.batch_decode(model.generate(**inputs, **options), skip_special_tokens=True)
