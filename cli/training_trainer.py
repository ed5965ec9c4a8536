"""The Trainer of `minillm train`, and what it says when it begins."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from minillm.cli.console import say
from minillm.cli.training_checkpoints import Begun
from minillm.cli.training_plan import Plan
from minillm.cli.training_report import flops_words, memory_words
from minillm.evaluation.held_out import HeldOutScore
from minillm.experiments.cost import read_cost
from minillm.experiments.memory import training_memory
from minillm.loss import why_logits


class LogitFreeTrainer(Trainer):
    """Asks for the loss without logits in each training step, so that the config of the model it saves does not.

    Attributes:
        score: scores the held-out rows, in place of the Trainer's own evaluation, which gives each batch the same
            weight; None gives up. Left at None, the Trainer evaluates.
    """

    skips_logits: bool | None = None
    score: Callable[[], HeldOutScore | None] | None = None
    losses: tuple[int, list[torch.Tensor]] = (-1, [])
    scored: tuple[int, HeldOutScore | None] = (-1, None)

    def compute_loss(self, model: torch.nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        if self.skips_logits is None:
            # Only now is the head as it trains: adapted, or sharded over devices.
            reason = why_logits(self.accelerator.unwrap_model(model))
            if reason is not None:
                say(f"each step holds all logits, which takes memory: {reason}")
            self.skips_logits = reason is None
        if self.skips_logits and model.training:
            inputs = {**inputs, "skip_logits": True}
        return super().compute_loss(model, inputs, *args, **kwargs)

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        loss = super().training_step(*args, **kwargs)
        if self.losses[0] != self.state.global_step:
            self.losses = (self.state.global_step, [])
        self.losses[1].append(loss)
        return loss

    def step_loss(self) -> float:
        """The loss of the last step, read from the device."""
        return float(sum(self.losses[1]))

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        if self.score is None:
            return super().evaluate(*args, **kwargs)
        score, metrics = self.score(), {}
        if score is not None:
            result = score.result
            metrics = {
                "eval_loss": result.nll,
                "eval_perplexity": result.perplexity,
                "eval_tokens": float(result.num_tokens),
            }
            self.scored = (self.state.global_step, score)
            self.log(metrics)
            say(f"step {self.state.global_step}: perplexity {result.perplexity:.2f} held out")
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics


class OpeningCallback(TrainerCallback):
    """Says, before the first step, what is trained and what a step takes.

    Args:
        row: makes a batch of one row.
        plan: of the run.
        length: tokens of a row, padding included.
    """

    def __init__(self, row: Callable[[], dict[str, torch.Tensor]], plan: Plan, length: int) -> None:
        self.row, self.plan, self.length = row, plan, length
        self.facts: dict[str, str] = {}
        self.step_flops = 0.0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        model, plan, row = kwargs["model"], self.plan, self.row()
        trained, total = (model.num_parameters(only_trainable=only) for only in (True, False))
        tokens = plan.rows_per_step * self.length
        cost, keys = read_cost(model.config), mean_keys(row)
        self.step_flops = tokens * cost.training_flops(keys, frozen=trained < total / 2)
        inputs: dict[str, Any] = {name: tensor.to(args.device) for name, tensor in row.items()}
        if why_logits(model) is None:
            inputs["skip_logits"] = True
        kind = torch.bfloat16 if args.bf16 else torch.float16
        with torch.autocast(args.device.type, kind, enabled=args.bf16 or args.fp16):
            memory = training_memory(model, args.optim, inputs, args.per_device_train_batch_size)
        self.facts = {
            "parameters": f"{total:,}, of which {trained:,} are trained",
            "a step": f"{plan.rows_per_step} rows of {self.length} tokens: {tokens:,}, {flops_words(self.step_flops)}",
            "memory": memory_words(memory),
        }
        for topic, phrase in self.facts.items():
            say(f"{topic}: {phrase}")


def mean_keys(batch: dict[str, torch.Tensor]) -> float:
    """How many keys a token looks at on average: those of its document up to itself."""
    positions = batch.get("position_ids")
    if positions is None:
        return batch["input_ids"].shape[1] / 2
    return float(positions.float().mean()) + 1


class LongerCallback(TrainerCallback):
    """Has a run go on for more steps than it was begun for: the course of the learning rate is that of all of them."""

    def __init__(self, begun: Begun, plan: Plan) -> None:
        self.begun, self.plan = begun, plan

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        # Of the shorter run, from the checkpoint.
        state.compute_steps(args, state.max_steps)
        scheduler, optimizer = kwargs["lr_scheduler"], kwargs["optimizer"]
        before, after = optimizer.param_groups[0]["lr"], None
        if hasattr(scheduler, "lr_lambdas"):
            # The checkpoint holds the last rate of the shorter course, which would be that of the next step.
            scheduler.last_epoch -= 1
            scheduler.step()
            after = scheduler.get_last_lr()[0]
        course = (
            "goes on by its own state" if after is None else f"goes on at {after:.2e}, where it stood at {before:.2e}"
        )
        say(
            f"lengthened from {self.begun.total_steps} to {self.plan.total_steps} steps: the learning rate {course}; "
            f"{self.plan.total_steps} steps in one would have had other rates before step {self.begun.step}"
        )


def load_finished(model: Any, checkpoint: Path) -> None:
    """Gives a model the weights of a checkpoint, in place."""
    from peft import PeftModel, load_peft_weights, set_peft_model_state_dict

    if isinstance(model, PeftModel):
        set_peft_model_state_dict(model, load_peft_weights(str(checkpoint), device=str(model.device)))
        return
    trained = type(model).from_pretrained(checkpoint, dtype=model.dtype)
    model.load_state_dict(trained.state_dict())
