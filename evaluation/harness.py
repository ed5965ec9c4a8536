"""MiniLLM in EleutherAI's lm-evaluation-harness: `pip install 'minillm-hf[eval]'`.

The harness generates with a prompt as the prefix of a prefix model, since `generate()` does, but scores text as a
causal model would. Here scoring reads its context as the prefix too.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from huggingface_hub.utils import tqdm

from minillm.evaluation.likelihood import pair_row, reads_prefixes, score_rows

try:
    from lm_eval import simple_evaluate  # pyright: ignore[reportMissingImports]
    from lm_eval.api.registry import register_model  # pyright: ignore[reportMissingImports]
    from lm_eval.models.huggingface import HFLM  # pyright: ignore[reportMissingImports]
    from lm_eval.tasks import TaskManager  # pyright: ignore[reportMissingImports]
except ImportError as error:
    raise ImportError(
        f"lm-evaluation-harness is missing or broken ({error}): pip install 'minillm-hf[eval]'"
    ) from error

Request = tuple[tuple[str, str] | None, list[int], list[int]]


@register_model("minillm")
class MiniLLMHarness(HFLM):
    """The harness's `hf` model, with which a model of `attention_type="prefix"` reads a context as its prefix.

    Contexts of `loglikelihood` are the prefix; in rolling windows it is their first token, which makes them causal:
    their figures are those of the stock class. Models that are causal, or trained as causal ones
    (`prompt_is_prefix=False`), are left to the stock class altogether.

    Args:
        pretrained: a model, or its folder or repository.
        options: of `HFLM`: `tokenizer`, `batch_size`, `max_length`, `device`, `dtype`, ... With a prefix
            `logits_cache` is off: the harness would take the log probabilities of one request for another whose
            tokens are the same but for the last, wherever the prefix of either ends.

    Raises:
        ValueError: a batch size of "auto" with a prefix model, or `logits_cache=True`.
    """

    def __init__(self, pretrained: Any, **options: Any) -> None:
        asked = options.pop("logits_cache", None)
        super().__init__(pretrained, logits_cache=False, **options)
        if not reads_prefixes(self.model):
            self.logits_cache = asked is not False
        elif asked:
            raise ValueError("`logits_cache=True`: the harness would take one prefix for another; leave it out")
        elif not isinstance(self.batch_size, int):
            raise ValueError(f"`batch_size={self.batch_size!r}`: give a number for a model with a prefix")

    def _loglikelihood_tokens(
        self, requests: Sequence[Request], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        if not reads_prefixes(self.model):
            return super()._loglikelihood_tokens(requests, disable_tqdm=disable_tqdm, override_bs=override_bs)
        rows = []
        for text, context, continuation in requests:
            # Too long a context is cut on its left, as by the stock class.
            kept = context[-max(0, self.max_length + 1 - len(continuation)) :]
            rows.append(pair_row(kept, continuation, prefix=1 if text is None else len(kept)))
        scores = score_rows(self.model, rows, override_bs or self.batch_size, self.show(len(rows), disable_tqdm))
        answers = [(score.log_likelihood, score.is_greedy) for score in scores]
        for (text, _, _), answer in zip(requests, answers, strict=True):
            if text is not None:
                self.cache_hook.add_partial("loglikelihood", text, answer)
        return answers

    def show(self, total: int, hidden: bool) -> Any:
        """A bar as the harness shows it."""
        bar = tqdm(total=total, disable=hidden or self.rank != 0, desc="Running loglikelihood requests")

        def progress(what: str, done: int, total: int) -> None:
            bar.update(done - bar.n)
            if done == total:
                bar.close()

        return progress


def find_tasks(tasks: Sequence[str], task_folder: str | Path | None = None) -> TaskManager:
    """Where the harness finds these tasks.

    Args:
        tasks: names of tasks, groups or tags.
        task_folder: a folder with YAML files of tasks of one's own.

    Raises:
        ValueError: no such folder, or a name that is no task.
    """
    if task_folder is not None and not Path(task_folder).is_dir():
        raise ValueError(f"the task folder {task_folder} does not exist")
    manager = None
    if task_folder is not None:
        # Without the harness's own thousands, which take seconds to be found.
        manager = TaskManager(include_path=str(task_folder), include_defaults=False)
    if manager is None or missing(manager, tasks):
        manager = TaskManager(include_path=None if task_folder is None else str(task_folder))
    unknown = missing(manager, tasks)
    if unknown or not tasks:
        where = "" if task_folder is None else f" or in {task_folder}"
        raise ValueError(f"no task {', '.join(unknown) or 'is named'} in lm-evaluation-harness{where}")
    return manager


def missing(manager: TaskManager, tasks: Sequence[str]) -> list[str]:
    return [name for name in tasks if not manager.match_tasks([name])]


def run_harness(
    model: Any,
    tokenizer: Any,
    tasks: Sequence[str],
    task_folder: str | Path | None = None,
    batch_size: int = 8,
    max_length: int | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Runs tasks of lm-evaluation-harness on a model.

    Args:
        model: any causal language model of transformers.
        tokenizer: the model's.
        tasks: names of tasks, groups or tags.
        task_folder: a folder with YAML files of tasks of one's own.
        batch_size: requests in one forward.
        max_length: tokens that the model takes; None: as its config says.
        options: of `lm_eval.simple_evaluate`: `num_fewshot`, `limit`, `apply_chat_template`, `gen_kwargs`, seeds, and
            `task_manager`, with which nothing is looked for again.

    Returns:
        What `simple_evaluate` returns: `results` by task, `samples`, settings.

    Raises:
        ValueError: no such folder, or a name that is no task.
    """
    manager = options.pop("task_manager", None) or find_tasks(tasks, task_folder)
    harness = MiniLLMHarness(model, tokenizer=tokenizer, batch_size=batch_size, max_length=max_length)
    return simple_evaluate(harness, tasks=list(tasks), task_manager=manager, **options)
