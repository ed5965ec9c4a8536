"""`minillm generate`: continue prompts, batched or streamed, and fill their blanks."""

import sys
from typing import Any

import torch
import typer
from transformers import AutoTokenizer, TextStreamer, set_seed

from minillm.cli.loading import load_model, load_pretrained
from minillm.tokenization.glm_layout import find_glm_tokens


def run(
    model_name: str,
    prompts: list[str] | None,
    max_new_tokens: int,
    temperature: float,
    top_p: float,
    num_beams: int,
    seed: int,
    stream: bool,
) -> None:
    """Prints each prompt with its continuation, or with its blanks filled.

    Raises:
        ValueError: no prompt or an empty one, streaming of several prompts, beams or blanks, `top_p` without sampling,
            or no model at the given place.
    """
    prompts = prompts or [line.rstrip("\r\n") for line in sys.stdin if line.strip()]
    if not prompts or not all(prompts):
        raise ValueError("no prompt: give some as arguments, or one per line on the standard input")
    if stream and (len(prompts) > 1 or num_beams > 1):
        raise ValueError("--stream prints one prompt without beams as it comes; give one prompt and no --num-beams")
    sampling = {"do_sample": True, "temperature": temperature, "top_p": top_p} if temperature > 0 else {}
    if not sampling and top_p < 1.0:
        raise ValueError(f"--top-p {top_p} needs sampling: set --temperature above 0")
    tokenizer = load_pretrained(AutoTokenizer, model_name, "tokenizer", padding_side="left")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = load_model(model_name, allow_adapter=True).to(device)
    set_seed(seed)
    options = {"max_new_tokens": max_new_tokens, "num_beams": num_beams, **(sampling or {"do_sample": False})}
    blanked = [has_blank(model, tokenizer, prompt) for prompt in prompts]
    if stream and blanked[0]:
        raise ValueError("--stream prints a continuation as it comes; a blank is filled before it is printed")
    if stream:
        inputs = tokenizer(prompts, return_tensors="pt").to(device)
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
        typer.echo(text)


def has_blank(model: Any, tokenizer: Any, prompt: str) -> bool:
    """Whether a prompt holds a blank to fill: one before a start token is continued by `generate()` itself."""
    if not hasattr(model, "fill") or model.config.attention_type != "prefix":
        return False
    try:
        tokens = find_glm_tokens(tokenizer, model.config)
    except ValueError:
        return False
    ids = tokenizer(prompt)["input_ids"]
    return tokens.sop not in ids and not set(tokens.blanks).isdisjoint(ids)


def fill(model: Any, tokenizer: Any, prompts: list[str], options: dict[str, Any]) -> list[str]:
    return model.fill(prompts, tokenizer, **options).texts


def continue_texts(model: Any, tokenizer: Any, prompts: list[str], options: dict[str, Any]) -> list[str]:
    inputs = tokenizer(prompts, return_tensors="pt", padding=len(prompts) > 1).to(model.device)
    return tokenizer.batch_decode(model.generate(**inputs, **options), skip_special_tokens=True)
