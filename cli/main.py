"""The `minillm` command. What a command needs is imported inside it, so that help and completion wait for neither
torch nor transformers."""

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from minillm.cli.completion import family_names, preset_names
from minillm.cli.console import console, fail, one_line_errors, require_extra, say
from minillm.cli.train_command import train
from minillm.publishing.folders import claimed, full_disk_in_words, new_folder, reserved

app = typer.Typer(
    help="Train, tune, run and publish MiniLLM models.", no_args_is_help=True, pretty_exceptions_enable=False
)
tokenizer_app = typer.Typer(help="Make, extend and judge tokenizers.", no_args_is_help=True)
app.add_typer(tokenizer_app, name="tokenizer")


class SubwordKind(str, Enum):
    byte_bpe = "byte_bpe"
    sentencepiece_bpe = "sentencepiece_bpe"
    unigram = "unigram"
    wordpiece = "wordpiece"


class ItemWay(str, Enum):
    likelihood = "likelihood"
    letters = "letters"
    generation = "generation"


class Precision(str, Enum):
    auto = "auto"
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="folder for models, report and checkpoints")] = Path("minillm-demo"),
    corpus: Annotated[Path | None, typer.Option(help="text file or folder; left out: Python's own sources")] = None,
    steps: Annotated[int, typer.Option(min=1, help="training steps of each variant")] = 800,
    vocab_size: Annotated[int, typer.Option(min=300, help="tokens of the demo's tokenizer")] = 512,
    seed: Annotated[int, typer.Option(help="seed of weights, order and prefixes")] = 0,
) -> None:
    """Train a tokenizer and three small models, fine-tune one with LoRA, load them all without MiniLLM."""
    require_extra("train")
    with one_line_errors(resumes=True):
        from minillm.cli.demo import Demo, Settings

        path = None if corpus is None else str(corpus.resolve())
        with reserved(out), full_disk_in_words(out):
            Demo(out, Settings(corpus=path, steps=steps, vocab_size=vocab_size, seed=seed)).run()


@tokenizer_app.command("train")
def train_tokenizer(
    files: Annotated[list[Path], typer.Argument(help="text files and folders of them (UTF-8)")],
    out: Annotated[Path, typer.Option(help="folder for the tokenizer")],
    vocab_size: Annotated[int, typer.Option(min=1, help="number of tokens, special ones included")],
    model: Annotated[SubwordKind, typer.Option(help="subword model")] = SubwordKind.byte_bpe,
) -> None:
    """Train a tokenizer on text files."""
    with one_line_errors(), claimed(out):
        from minillm.data import load_corpus
        from minillm.tokenization.tokenization_minillm import MiniLLMTokenizer

        texts = [document.text for path in files for document in load_corpus(path)]
        tokenizer = MiniLLMTokenizer.train_from_iterator(
            texts,
            vocab_size=vocab_size,
            model=model.value,
            length=len(texts),
            show_progress=console.is_terminal,
        )
        with new_folder(out) as folder:
            tokenizer.save_pretrained(folder)
        say(f"{len(tokenizer)} tokens in {out}")


@tokenizer_app.command("extend")
def extend_tokenizer(
    tokenizer: Annotated[str, typer.Argument(help="tokenizer folder or repository")],
    corpus: Annotated[list[Path], typer.Argument(help="text files and folders of them (UTF-8)")],
    num_new: Annotated[int, typer.Option(min=1, help="number of tokens to add")],
    out: Annotated[Path, typer.Option(help="folder to write")],
    model: Annotated[str | None, typer.Option(help="model to give rows for the new tokens")] = None,
) -> None:
    """Add tokens that a corpus needs; old ids keep their meaning."""
    with one_line_errors(), claimed(out):
        from minillm.cli.tokenizer_runs import run_extension

        run_extension(tokenizer, corpus, num_new, out, model)


@tokenizer_app.command("report")
def report_tokenizer(
    tokenizer: Annotated[str, typer.Argument(help="tokenizer folder or repository")],
    corpus: Annotated[list[Path], typer.Argument(help="text files and folders of them (UTF-8)")],
    out: Annotated[Path | None, typer.Option(help="folder for report.md, report.json and report.png")] = None,
    compare: Annotated[str | None, typer.Option(help="a second tokenizer to set beside it")] = None,
    rare_below: Annotated[int, typer.Option(min=1, help="a piece that occurs less often is rare")] = 5,
) -> None:
    """Say how well a tokenizer fits a corpus: tokens per character and word of each language, idle tokens."""
    if out is not None:
        require_extra("train")
    with one_line_errors():
        from minillm.cli.tokenizer_runs import run_report

        run_report(tokenizer, corpus, out, compare, rare_below)


app.command()(train)


@app.command()
def generate(
    model: Annotated[str, typer.Argument(help="model folder or repository")],
    prompts: Annotated[list[str] | None, typer.Argument(help="prompts; left out: one per line of the input")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="most tokens to add, for each blank too")] = 64,
    temperature: Annotated[float, typer.Option(min=0.0, help="0: greedy")] = 0.0,
    top_p: Annotated[float, typer.Option(min=0.0, max=1.0)] = 1.0,
    num_beams: Annotated[int, typer.Option(min=1)] = 1,
    seed: Annotated[int, typer.Option()] = 0,
    stream: Annotated[bool, typer.Option(help="print tokens as they come (one prompt)")] = False,
    special_tokens: Annotated[
        bool, typer.Option("--special-tokens", help="read all special tokens in prompts; else only blanks and sop")
    ] = False,
) -> None:
    """Continue prompts; with a prefix model, fill [MASK], [sMASK] and [gMASK] in those that hold such a blank."""
    with one_line_errors():
        from minillm.cli.generation_run import Decoding, run

        decoding = Decoding(max_new_tokens, temperature, top_p, num_beams, seed)
        run(model, prompts, decoding, stream, special_tokens)


@app.command()
def chat(
    model: Annotated[str, typer.Argument(help="folder or repository of a model or an adapter")],
    system: Annotated[str | None, typer.Option(help="system prompt")] = None,
    chat_template: Annotated[Path | None, typer.Option(help="Jinja file; left out: the tokenizer's template")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="most tokens of an answer")] = 512,
    temperature: Annotated[float | None, typer.Option(min=0.0, help="0: greedy; left out: as the model says")] = None,
    top_p: Annotated[float | None, typer.Option(min=0.0, max=1.0, help="left out: as the model says")] = None,
    top_k: Annotated[int | None, typer.Option(min=1, help="left out: as the model says")] = None,
    repetition_penalty: Annotated[float | None, typer.Option(help="left out: as the model says")] = None,
    seed: Annotated[int, typer.Option(help="seed of the draws")] = 0,
    special_tokens: Annotated[
        bool, typer.Option("--special-tokens", help="read special tokens in messages; else they are text")
    ] = False,
) -> None:
    """Talk with a model: answers come as they are made, /help lists commands. Questions can be piped, one a line."""
    with one_line_errors():
        from minillm.cli.chat_run import ChatOptions, run

        sampling = (max_new_tokens, temperature, top_p, top_k, repetition_penalty, seed)
        run(model, ChatOptions(system, chat_template, *sampling, special_tokens))


@app.command()
def evaluate(
    model: Annotated[str, typer.Argument(help="folder or repository of a model or an adapter")],
    data: Annotated[Path | None, typer.Option(help="text file or folder, or .jsonl with text: bits per byte")] = None,
    items: Annotated[Path | None, typer.Option(help=".jsonl of questions: accuracy")] = None,
    tasks: Annotated[str | None, typer.Option(help="names of lm-evaluation-harness' tasks, with commas")] = None,
    compare: Annotated[str | None, typer.Option(help="a second model, on the same data")] = None,
    adapter: Annotated[str | None, typer.Option(help="adapter to put on top of the first model")] = None,
    out: Annotated[
        Path | None, typer.Option(help="folder for results.json and what each document and item got")
    ] = None,
    ways: Annotated[
        list[ItemWay] | None, typer.Option("--way", help="items: only in this way; give it several times for several")
    ] = None,
    shots: Annotated[int, typer.Option(min=0, help="items, tasks: solved ones before each")] = 0,
    shot_file: Annotated[Path | None, typer.Option(help="items: where solved ones come from")] = None,
    rotate: Annotated[
        bool, typer.Option("--rotate", help="items: letters in all cyclic orders of the options")
    ] = False,
    chat_template: Annotated[
        bool, typer.Option("--chat-template", help="items, tasks: ask in the turns of the tokenizer's template")
    ] = False,
    glm: Annotated[
        bool | None, typer.Option("--glm/--no-glm", help="answers fill [MASK]; left out: as the config tells")
    ] = None,
    task_folder: Annotated[Path | None, typer.Option(help="tasks: folder with tasks of your own")] = None,
    max_length: Annotated[int | None, typer.Option(min=1, help="most tokens in a row; left out: the model's")] = None,
    max_new_tokens: Annotated[
        int | None, typer.Option(min=1, help="items: most tokens of a generated answer; left out: 32")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="rows in one forward")] = 8,
    limit: Annotated[int | None, typer.Option(min=1, help="only the first so many documents, items, samples")] = None,
    device: Annotated[
        str | None, typer.Option(help="cpu, cuda, ...; left out: an accelerator if there is one")
    ] = None,
    dtype: Annotated[Precision, typer.Option(help="weights' dtype; auto: as they are stored")] = Precision.auto,
    seed: Annotated[int, typer.Option(help="seed of intervals and of solved items")] = 0,
    special_tokens: Annotated[
        bool, typer.Option("--special-tokens", help="data: read special tokens in texts; else they are text")
    ] = False,
) -> None:
    """Judge a model: bits per byte of texts, questions scored every way, tasks of lm-evaluation-harness."""
    given = dict(locals())
    if tasks is not None:
        require_extra("eval")
    with one_line_errors():
        from minillm.cli.evaluation_run import Options, run

        given |= {"ways": tuple(way.value for way in ways or ()), "dtype": dtype.value}
        run(Options(**given))


@app.command()
def export(
    model: Annotated[str, typer.Argument(help="model folder or repository")],
    out: Annotated[Path, typer.Argument(help="folder to write")],
    adapter: Annotated[str | None, typer.Option(help="LoRA adapter to merge into it")] = None,
    dtype: Annotated[str | None, typer.Option(help="weights' dtype, e.g. bfloat16")] = None,
    family: Annotated[str | None, typer.Option("--as", help="a checkpoint of this family, e.g. llama")] = None,
    settings: Annotated[list[str] | None, typer.Option("--set", help="with --as: FIELD=VALUE of the config")] = None,
) -> None:
    """Write a folder that anyone can load: weights, config, tokenizer, code and model card."""
    if family is None and settings:
        fail("--set needs --as")
    with one_line_errors(), claimed(out):
        from minillm.cli.publishing import export_model

        if family is None:
            export_model(model, out, adapter, dtype)
        else:
            from minillm.cli.conversion_run import run_export_as

            run_export_as(model, out, family, adapter, dtype, settings or [])
        say(f"written: {out}")


@app.command()
def convert(
    source: Annotated[str, typer.Option("--from", help="checkpoint folder, repository or .gguf file")],
    to: Annotated[Path, typer.Option(help="folder to write")],
    family: Annotated[str | None, typer.Option(help="its family, where the config does not tell")] = None,
    dtype: Annotated[str | None, typer.Option(help="weights' dtype; left out: the checkpoint's")] = None,
    settings: Annotated[list[str] | None, typer.Option("--set", help="FIELD=VALUE of the config")] = None,
    ignore_key: Annotated[list[str] | None, typer.Option(help="config key that changes nothing")] = None,
) -> None:
    """Turn a checkpoint of another family (GPT-2, BLOOM, LLaMA, Falcon, GLM, ...) into a MiniLLM with equal logits."""
    with one_line_errors(), claimed(to):
        from minillm.cli.conversion_run import run_convert

        run_convert(source, to, family, dtype, settings or [], ignore_key or [])


@app.command()
def push(
    model: Annotated[str, typer.Argument(help="folder of a model or an adapter")],
    repository: Annotated[str, typer.Argument(help="name on the Hub: user/name")],
    private: Annotated[bool | None, typer.Option("--private/--public")] = None,
    base: Annotated[
        str | None, typer.Option(help="repository of an adapter's base model; left out: as stored")
    ] = None,
) -> None:
    """Upload a model with its tokenizer, or an adapter, to the Hub."""
    with one_line_errors():
        from minillm.cli.publishing import push_model

        say(push_model(model, repository, private, base))


@app.command()
def presets(
    family: Annotated[
        str | None, typer.Argument(help="only this family, e.g. llama; left out: all", autocompletion=family_names)
    ] = None,
) -> None:
    """List the named architectures with their parameter counts."""
    with one_line_errors():
        from minillm.cli.inspection import print_presets

        print_presets(family)


@app.command()
def info(
    model: Annotated[
        str, typer.Argument(help="preset, config file, model folder or repository", autocompletion=preset_names)
    ],
) -> None:
    """Say in words what a model is, and which attention back ends can serve it."""
    with one_line_errors():
        from minillm.cli.inspection import print_info

        print_info(model)


def version(show: bool) -> None:
    if show:
        from minillm.version import __version__

        say(__version__)
        raise typer.Exit


@app.callback()
def main(
    show_version: Annotated[
        bool, typer.Option("--version", callback=version, is_eager=True, help="print the version and end")
    ] = False,
) -> None:
    """Train, tune, run and publish MiniLLM models."""
