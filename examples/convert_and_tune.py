"""Turns a checkpoint of another family into a MiniLLM, tunes it with LoRA, and takes the result out again as a LLaMA.

python examples/convert_and_tune.py path/to/llama --out my-llama     (a folder, a repository or a .gguf file)
"""

from pathlib import Path
from pydoc_data.topics import topics
from typing import Annotated

import typer
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments, set_seed

from minillm.conversion import convert, export
from minillm.data import TextDocument, load_corpus, split_corpus, tokenize_documents
from minillm.evaluation import perplexity
from minillm.training import DataCollatorForCausalLM, pack_dataset


def main(
    source: Annotated[str, typer.Argument(help="LLaMA checkpoint: folder, repository or .gguf file")],
    out: Annotated[Path, typer.Option(help="folder for all that is written")] = Path("tuned-llama"),
    corpus: Annotated[Path | None, typer.Option(help="text file or folder; left out: Python's help pages")] = None,
    family: Annotated[str, typer.Option(help="what to export as")] = "llama",
    steps: int = 60,
    length: int = 256,
) -> None:
    convert(source, out / "base")
    tokenizer = AutoTokenizer.from_pretrained(out / "base")
    model = AutoModelForCausalLM.from_pretrained(out / "base")
    print(f"converted: {type(model).__name__}, {model.num_parameters():,} parameters")

    set_seed(0)
    pages = [TextDocument(name, text) for name, text in topics.items()] if corpus is None else load_corpus(corpus)
    collator = DataCollatorForCausalLM(tokenizer, max_length=length)
    parts = split_corpus(pages, held_out=0.1)
    train, held_out = (pack_dataset(tokenize_documents(part, tokenizer), collator) for part in parts)
    held_out = held_out[:12]
    tuned = get_peft_model(model, LoraConfig(r=8, task_type="CAUSAL_LM"))
    before = perplexity(tuned, held_out, collator, batch_size=4)
    arguments = TrainingArguments(
        str(out),
        max_steps=steps,
        per_device_train_batch_size=2,
        learning_rate=1e-3,
        warmup_steps=max(1, steps // 20),
        logging_steps=max(1, steps // 20),
        save_strategy="no",
        disable_tqdm=True,
        report_to="none",
    )
    Trainer(tuned, arguments, collator, train).train()
    after = perplexity(tuned, held_out, collator, batch_size=4)
    print(f"held-out perplexity {before.perplexity:.2f} -> {after.perplexity:.2f} on {after.num_tokens} tokens")

    tuned.save_pretrained(out / "adapter")
    tuned.merge_and_unload().save_pretrained(out / "merged")
    tokenizer.save_pretrained(out / "merged")
    # What it computes is still a LLaMA's: LlamaForCausalLM, vLLM and llama.cpp's converter read this folder.
    export(out / "merged", out / family, family)


if __name__ == "__main__":
    typer.run(main)
