"""Texts, models and arguments for the tests of TRL's trainers."""

from training_cases import tiny_model

from minillm import MiniLLMTokenizer

WORDS = ("sum", "square", "half")
TEXTS = [
    f"line {number}: " + " ".join(f"the {word} of {number % 7}" for word in WORDS[: 1 + number % 3])
    for number in range(48)
]
NUMBERS = range(len(TEXTS))


def train_tokenizer():
    return MiniLLMTokenizer.train_from_iterator(TEXTS, vocab_size=320, show_progress=False)


def model_for(variant, tokenizer, **fields):
    return tiny_model(
        variant,
        **fields,
        vocab_size=len(tokenizer),
        max_position_embeddings=256,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )


def common(folder):
    return {
        "output_dir": str(folder),
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "report_to": [],
        "disable_tqdm": True,
        "save_strategy": "no",
        "logging_steps": 1,
        "per_device_train_batch_size": 4,
        "learning_rate": 0.1,
        "optim": "sgd",
    }


def train(trainer):
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def normed_model(tokenizer):
    model = model_for("causal", tokenizer, norm_head=True)
    # Rows whose lengths are far from 1: TRL multiplies by the weight of the head itself.
    model.lm_head.load_state_dict({"weight": 9 * model.lm_head.state_dict()["weight"]})
    return model
