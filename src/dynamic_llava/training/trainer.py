"""transformers' Trainer with what this training needs: two rates, exact means, checkpoints to rely on."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import Dataset, Sampler
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import SAFE_WEIGHTS_NAME

from dynamic_llava.data.training import LengthGrouped
from dynamic_llava.files import first_line
from dynamic_llava.training import optimizers
from dynamic_llava.training.recipe import Recipe
from dynamic_llava.training.stages.objective import Objective

COMPLETE = "complete"  # written last: a checkpoint without it was cut off


class Skipped:
    """Counts of what the data lost: entries left out and entries cut short, with the first reasons.

    Only cuts that took pictures have a reason.
    """

    SHOWN = 5

    def __init__(self) -> None:
        self.entries = 0
        self.truncated = 0
        self.reasons: list[str] = []
        self.cuts: list[str] = []

    def add(self, batch: Mapping[str, Any]) -> None:
        """Count one batch; drawn data loses nothing."""
        reasons = batch.get("skipped", [])
        self.entries += len(reasons)
        self.truncated += batch.get("truncated", 0)
        self.reasons += reasons[: max(0, self.SHOWN - len(self.reasons))]
        self.cuts += batch.get("cut", [])[: max(0, self.SHOWN - len(self.cuts))]

    def numbers(self) -> dict[str, int]:
        """Return the counts that are not 0."""
        counted = {"skipped_entries": self.entries, "truncated_entries": self.truncated}
        return {name: number for name, number in counted.items() if number}


class SparseTrainer(Trainer):
    """Trains an :class:`Objective`, whose forward returns the loss and sums for the log.

    Parameters
    ----------
    recipe
        Rates and schedules.
    sampler
        Order of the training data, the same in every process.
    """

    def __init__(self, recipe: Recipe, sampler: Sampler[int], **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.objective: Objective = cast(Any, self.model)  # also where it is wrapped later
        self.recipe = recipe
        self.sampler = sampler
        self.model_accepts_loss_kwargs = True  # the loss is divided by the totals of the whole step
        self.skipped = Skipped()
        self._sums: dict[str, Tensor] = {}

    # One step

    def compute_loss(
        self,
        model: nn.Module,
        inputs: Mapping[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Return the loss of one batch, times the processes over which gradients are averaged."""
        loss, sums = model(inputs["groups"], num_items_in_batch)
        if model.training:
            self.skipped.add(inputs)
        for name, pair in sums.items():
            before = self._sums.get(name)
            self._sums[name] = pair.detach().float() + (0 if before is None else before)
        if model.training:
            loss = loss * self.accelerator.num_processes
        return (loss, sums) if return_outputs else loss

    def prediction_step(self, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """Return the loss of an evaluation batch."""
        totals = self.objective.counts(inputs["groups"]).to(self.args.device)
        with torch.no_grad(), self.compute_loss_context_manager():
            loss = self.compute_loss(model, self._prepare_inputs(inputs), num_items_in_batch=totals)
        return loss.detach(), None, None

    def _get_num_items_in_batch(self, batch_samples: Sequence[Mapping[str, Any]], device: Any) -> Tensor:
        """Count what an optimizer step divides by, over its batches and all processes."""
        totals = (
            torch.stack([self.objective.counts(batch["groups"]) for batch in batch_samples]).sum(0).to(device)
        )
        gathered = self.accelerator.gather(totals[None])
        return cast(Tensor, gathered).sum(0)

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        norm = super()._clip_grad_norm(model)
        if norm is not None and not torch.isfinite(torch.as_tensor(float(norm))):
            output = self.recipe.run.output
            raise FloatingPointError(
                f"{output}: the gradient norm is {float(norm)} at step {self.state.global_step}; lower the "
                f"learning rate, then {go_on(output, '--resume --allow-changes')}"
            )
        return norm

    # Data, optimizer, log

    def _get_train_sampler(self, train_dataset: Dataset[Any] | None = None) -> Sampler[int]:
        return self.sampler

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Return the recipe's optimizer, with rates of their own for model and predictors."""
        if self.optimizer is None:
            self.optimizer = optimizers.optimizer(self.recipe.optimizer, model or cast(nn.Module, self.model))
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """Return warm-up and cosine on all rates."""
        if self.lr_scheduler is None:
            factor = optimizers.schedule(num_training_steps, self.recipe.optimizer.warmup)
            self.lr_scheduler = LambdaLR(cast(Any, optimizer or self.optimizer), factor)
            self._created_lr_scheduler = True
        return self.lr_scheduler

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the means of what the objective counted since the last log."""
        names = sorted(self._sums)
        if names and ("loss" in logs or "eval_loss" in logs):
            prefix = "eval_" if "eval_loss" in logs else ""
            pairs = torch.stack([self._sums[name].to(self.args.device) for name in names])
            pairs = self.accelerator.gather(pairs[None]).sum(0)
            for name, (total, number) in zip(names, pairs.tolist(), strict=True):
                if number:
                    logs[prefix + name] = total / number
            self._sums = {}
        super().log({**logs, **self.skipped.numbers()}, start_time)

    # Checkpoints

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        """Save what is trained, by the names of the objective's modules; ``init`` has the rest."""
        if not self.args.should_save:
            return
        state = cast(nn.Module, self.model).state_dict() if state_dict is None else state_dict
        trained = self._trained()
        kept = {name: tensor.contiguous() for name, tensor in state.items() if name in trained}
        super()._save(output_dir, kept)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """Load a checkpoint that holds exactly what is trained; refuse others."""
        path = Path(resume_from_checkpoint) / SAFE_WEIGHTS_NAME
        if path.is_file():
            with safe_open(path, framework="pt") as file:
                wrong = set(file.keys()) ^ self._trained()
            if wrong:
                raise ValueError(
                    f"{path.parent}: a checkpoint of another recipe: {min(wrong)} and {len(wrong) - 1} other "
                    "parameters are trained in one and not in the other"
                )
        super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        """Say nothing: what is frozen is missing on purpose."""

    def _trained(self) -> set[str]:
        parameters = cast(nn.Module, self.model).named_parameters()
        return {name for name, parameter in parameters if parameter.requires_grad}

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Write a checkpoint and mark it as complete; say what to do where it cannot be written."""
        folder = self.recipe.run.output / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        try:
            super()._save_checkpoint(model, trial)
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                (folder / COMPLETE).touch()
        except (OSError, RuntimeError) as error:
            shutil.rmtree(folder, ignore_errors=True)
            raise OSError(
                f"{folder}: the checkpoint could not be written ({first_line(error)}); free space, then "
                f"{go_on(folder.parent, '--resume from the one before')}"
            ) from error


def last_checkpoint(folder: Path) -> Path | None:
    """Return the last checkpoint in ``folder`` that was written to its end."""
    marks = folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*/{COMPLETE}")
    return max((mark.parent for mark in marks), key=step_of, default=None)


def go_on(folder: Path, resume: str) -> str:
    """Return what to do after a run has ended early: ``resume``, where there is something to resume from."""
    return "remove the folder and start again" if last_checkpoint(folder) is None else resume


def step_of(checkpoint: Path) -> int:
    """Return the step that a checkpoint was written after."""
    return int(checkpoint.name.rpartition("-")[2])


class Schedules(TrainerCallback):
    """Lets the objective follow its schedules, and the data its order."""

    def __init__(self, objective: Objective, sampler: Sampler[int]) -> None:
        self.objective = objective
        self.sampler = sampler

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Log, save and evaluate as often as the recipe says, not as the checkpoint to resume remembers."""
        state.compute_steps(args, state.max_steps)

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Choose the order of the epoch."""
        if isinstance(self.sampler, LengthGrouped):
            self.sampler.set_epoch(int(state.epoch or 0))

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Set what the next step trains with."""
        self.objective.begin_step(state.global_step, state.max_steps)
