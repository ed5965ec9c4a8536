"""`minillm generate`: continue prompts, batched or streamed."""

import sys

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, TextStreamer, set_seed

from minillm.cli.console import console


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
        ValueError: no prompt, or streaming of several prompts or beams.
    """
    prompts = prompts or [line.rstrip("\n") for line in sys.stdin if line.strip()]
    if not prompts:
        raise ValueError("no prompt: give some as arguments, or one per line on the standard input")
    if stream and (len(prompts) > 1 or num_beams > 1):
        raise ValueError("--stream prints one prompt without beams as it comes; give one prompt and no --num-beams")
    tokenizer = AutoTokenizer.from_pretrained(model_name, padding_side="left")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = AutoModelForCausalLM.from_pretrained(model_name).to(device)
    set_seed(seed)
    inputs = tokenizer(prompts, return_tensors="pt", padding=len(prompts) > 1).to(device)
    sampling = {"do_sample": True, "temperature": temperature, "top_p": top_p} if temperature > 0 else {}
    if not sampling and top_p < 1.0:
        raise ValueError(f"--top-p {top_p} needs sampling: set --temperature above 0")
    options = {"max_new_tokens": max_new_tokens, "num_beams": num_beams, **(sampling or {"do_sample": False})}
    if stream:
        model.generate(**inputs, **options, streamer=TextStreamer(tokenizer, skip_special_tokens=True))
        return
    for text in tokenizer.batch_decode(model.generate(**inputs, **options), skip_special_tokens=True):
        console.print(text, highlight=False, markup=False, soft_wrap=True)
