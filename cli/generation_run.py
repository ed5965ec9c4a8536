"""`minillm generate`: continue prompts, batched or streamed."""

import sys

import torch
import typer
from transformers import AutoTokenizer, TextStreamer, set_seed

from minillm.cli.loading import load_model, load_pretrained


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
    """Prints each prompt with its continuation.

    Raises:
        ValueError: no prompt or an empty one, streaming of several prompts or beams, `top_p` without sampling, or no
            model at the given place.
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
    inputs = tokenizer(prompts, return_tensors="pt", padding=len(prompts) > 1).to(device)
    options = {"max_new_tokens": max_new_tokens, "num_beams": num_beams, **(sampling or {"do_sample": False})}
    if stream:
        model.generate(**inputs, **options, streamer=TextStreamer(tokenizer, skip_special_tokens=True))
        return
    for text in tokenizer.batch_decode(model.generate(**inputs, **options), skip_special_tokens=True):
        # Not through rich, which would expand tabs and drop control characters.
        typer.echo(text)
