"""Fine-tunes a model with LoRA on answers alone; a prefix model reads the prompts in both directions.

python examples/sft_lora.py my-model --out my-tuned-model     (after examples/pretrain.py --out my-model)
"""

import random
from pathlib import Path
from typing import Annotated

import typer
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments, set_seed

import minillm  # noqa: F401  registers the models with transformers and PEFT
from minillm.evaluation import perplexity
from minillm.training import DataCollatorForSFT, pack_dataset


def conversations(count: int) -> list[list[dict[str, str]]]:
    """A made-up task: the user gives a word, the assistant counts its letters."""
    rng = random.Random(0)
    words = ["".join(rng.choices("abcdefgh", k=rng.randint(2, 5))) for _ in range(count)]
    return [[{"role": "user", "content": w}, {"role": "assistant", "content": f"{len(w)} letters"}] for w in words]


def main(
    model_folder: Annotated[Path, typer.Argument(help="what examples/pretrain.py has written")],
    out: Annotated[Path, typer.Option(help="folder for the adapter and the merged model")] = Path("tuned"),
    steps: int = 300,
    samples: int = 1000,
) -> None:
    set_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    model = AutoModelForCausalLM.from_pretrained(model_folder)

    # The chat template marks the assistant's tokens; the collator scores these alone.
    encoded = [
        tokenizer.apply_chat_template(turns, return_dict=True, return_assistant_tokens_mask=True)
        for turns in conversations(samples)
    ]
    collator = DataCollatorForSFT(
        tokenizer,
        max_length=model.config.max_position_embeddings,
        prompt_is_prefix=model.config.attention_type == "prefix",
    )
    train, held_out = (pack_dataset(part, collator) for part in (encoded[samples // 10 :], encoded[: samples // 10]))

    # Pre-training never saw the tokens of the roles, so their rows of the embedding are trained as well.
    roles = tokenizer.convert_tokens_to_ids(["<|user|>", "<|assistant|>"])
    tuned = get_peft_model(model, LoraConfig(r=16, task_type="CAUSAL_LM", trainable_token_indices=roles))
    tuned.print_trainable_parameters()
    before = perplexity(tuned, held_out, collator)
    arguments = TrainingArguments(
        str(out),
        max_steps=steps,
        per_device_train_batch_size=2,
        learning_rate=5e-3,
        warmup_steps=steps // 20,
        logging_steps=max(1, steps // 20),
        save_strategy="no",
        disable_tqdm=True,
        report_to="none",
    )
    Trainer(tuned, arguments, collator, train).train()
    after = perplexity(tuned, held_out, collator)
    print(f"held-out perplexity of answers {before.perplexity:.2f} -> {after.perplexity:.2f}")

    tuned.save_pretrained(out / "adapter")
    tuned.merge_and_unload().save_pretrained(out / "merged")
    tokenizer.save_pretrained(out / "merged")


if __name__ == "__main__":
    typer.run(main)
