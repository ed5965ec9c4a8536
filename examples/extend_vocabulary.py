"""Gives a model tokens for Chinese, as Chinese-LLaMA did LLaMA (arXiv 2304.08177), and trains their embeddings.

python examples/extend_vocabulary.py my-model --out my-chinese-model     (after examples/pretrain.py --out my-model)
"""

from pathlib import Path
from typing import Annotated

import typer
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments, set_seed

import minillm  # noqa: F401  registers the models with transformers and PEFT
from minillm.data import load_corpus, tokenize_documents
from minillm.evaluation import perplexity
from minillm.tokenization import extend_vocabulary, measure_fertility
from minillm.training import DataCollatorForCausalLM, pack_dataset, resize_for_vocabulary

# A real run needs megabytes: --corpus.
CHINESE = """语言模型根据前面的词预测下一个词。
词表里没有的汉字要用三个字节来表示，所以句子变得很长。
扩充词表以后，同样的句子只需要更少的词元。
新的词元从旧的词元的平均值开始训练。
模型先学习英文，再学习中文。
训练语言模型需要很多文本，也需要很多时间。
我们先扩充词表，再用中文文本继续训练模型。
词表越大，句子越短，模型也越大。
旧的词元保持旧的编号，所以模型不会忘记英文。
下一个词是什么，模型只能根据前面的词来预测。
"""


def nats_per_character(model, texts, tokenizer, collator) -> float:
    """The loss in a unit that does not depend on the vocabulary, unlike perplexity."""
    result = perplexity(model, tokenize_documents(texts, tokenizer), collator)
    return result.nll * result.num_tokens / sum(map(len, texts))


def main(
    model_folder: Annotated[Path, typer.Argument(help="what examples/pretrain.py --variant causal has written")],
    out: Annotated[Path, typer.Option(help="folder for the larger model")] = Path("extended"),
    corpus: Annotated[Path | None, typer.Option(help="Chinese text file or folder; left out: a few lines")] = None,
    num_new_tokens: int = 60,
    steps: int = 100,
) -> None:
    set_seed(0)
    texts = CHINESE.splitlines() if corpus is None else [document.text for document in load_corpus(corpus)]
    held_out, train = texts[::5], [text for index, text in enumerate(texts) if index % 5]
    old, model = AutoTokenizer.from_pretrained(model_folder), AutoModelForCausalLM.from_pretrained(model_folder)
    collator = DataCollatorForCausalLM(old, max_length=model.config.max_position_embeddings)
    before = nats_per_character(model, held_out, old, collator)

    tokenizer = extend_vocabulary(old, train, num_new_tokens=num_new_tokens)
    new_ids = resize_for_vocabulary(model, old, tokenizer)
    for name, each in (("old", old), ("new", tokenizer)):
        rates = measure_fertility(each, held_out).total.rates()
        print(f"{name} tokenizer: {rates['tokens_per_character']:.2f} tokens per character")

    # Chinese-LLaMA's first stage trains embeddings alone, its second LoRA as well; this does both at once.
    tuned = get_peft_model(model, LoraConfig(r=16, task_type="CAUSAL_LM", trainable_token_indices=new_ids))
    arguments = TrainingArguments(
        str(out),
        max_steps=steps,
        per_device_train_batch_size=2,
        learning_rate=1e-2,
        logging_steps=max(1, steps // 20),
        save_strategy="no",
        disable_tqdm=True,
        report_to="none",
    )
    Trainer(tuned, arguments, collator, pack_dataset(tokenize_documents(train, tokenizer), collator)).train()
    after = nats_per_character(tuned, held_out, tokenizer, collator)
    print(f"held-out loss {before:.2f} -> {after:.2f} nats per character")
    tuned.merge_and_unload().save_pretrained(out)
    tokenizer.save_pretrained(out)


if __name__ == "__main__":
    typer.run(main)
