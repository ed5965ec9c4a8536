"""Pre-trains a small model on the sources of Python's standard library with the stock Trainer, documents packed.

python examples/pretrain.py --variant prefix --steps 500 --out my-model
"""

from pathlib import Path
from typing import Annotated

import typer
from transformers import Trainer, TrainingArguments, set_seed

from minillm import MiniLLMConfig, MiniLLMForCausalLM, MiniLLMTokenizer
from minillm.data import load_corpus, split_corpus, tokenize_documents
from minillm.evaluation import perplexity
from minillm.training import DataCollatorForCausalLM, DataCollatorForPrefixLM, SetEpochCallback, pack_dataset

VARIANTS = {
    "causal": {},
    "prefix": {"attention_type": "prefix"},
    "alibi": {"position_embedding_type": "alibi"},
}


def main(
    out: Annotated[Path, typer.Option(help="folder for the model")] = Path("pretrained"),
    variant: Annotated[str, typer.Option(help=", ".join(VARIANTS))] = "causal",
    corpus: Annotated[Path | None, typer.Option(help="text file or folder; left out: Python's own sources")] = None,
    steps: int = 500,
    length: int = 256,
    hidden_size: int = 128,
) -> None:
    train, held_out = split_corpus(load_corpus(corpus))
    texts = [document.text for document in train]
    tokenizer = MiniLLMTokenizer.train_from_iterator(texts, vocab_size=512)

    set_seed(0)
    config = MiniLLMConfig.for_tokenizer(
        tokenizer,
        hidden_size=hidden_size,
        num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=length,
        tie_word_embeddings=True,
        **VARIANTS[variant],
    )
    model = MiniLLMForCausalLM(config)

    # A row holds several documents; none sees another, neither do their positions and prefixes.
    kind = DataCollatorForPrefixLM if variant == "prefix" else DataCollatorForCausalLM
    collator = kind(tokenizer, max_length=length)
    arguments = TrainingArguments(
        str(out),
        max_steps=steps,
        per_device_train_batch_size=4,
        learning_rate=4e-3,
        lr_scheduler_type="cosine",
        warmup_steps=steps // 20,
        logging_steps=max(1, steps // 20),
        save_strategy="no",
        disable_tqdm=True,
        report_to="none",
    )
    rows = pack_dataset(tokenize_documents(train, tokenizer), collator)
    held_out_rows = pack_dataset(tokenize_documents(held_out, tokenizer), collator, fixed_prefixes=True)
    Trainer(model, arguments, collator, rows, callbacks=[SetEpochCallback(collator)]).train()
    # `Trainer.save_model` would put its pickled arguments beside the weights.
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)

    score = perplexity(model, held_out_rows, collator)
    print(f"held-out perplexity {score.perplexity:.2f} on {score.num_tokens} tokens")


if __name__ == "__main__":
    typer.run(main)
