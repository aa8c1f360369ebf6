"""One stage of training, from its recipe to the finished model."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader
from transformers import PrinterCallback, TrainingArguments

from dynamic_llava.checkpoints import load_skeleton
from dynamic_llava.sparsifier import sparsifier_of
from dynamic_llava.training import stages
from dynamic_llava.training.feeding import Feed, feed
from dynamic_llava.training.plan import Plan
from dynamic_llava.training.recipe import Recipe
from dynamic_llava.training.record import KEPT, Record, history
from dynamic_llava.training.trainer import (
    COMPLETE,
    Schedules,
    SparseTrainer,
    go_on,
    last_checkpoint,
    step_of,
)
from dynamic_llava.training.watching import Bar, Log

LOG = "log.jsonl"
MODEL = "model"


def train(recipe_path: Path, resume: bool = False, allow_changes: bool = False) -> Path:
    """Run one stage and write the finished model.

    Parameters
    ----------
    recipe_path
        A YAML recipe; see :class:`Recipe`.
    resume
        Continue from the last complete checkpoint in the output folder, as if the run had never stopped.
    allow_changes
        Resume although the recipe or the data have changed since the run was begun.

    Returns
    -------
    Path
        Folder of the finished model; of the predictors alone where the model stayed as it was.

    Raises
    ------
    FileNotFoundError
        If the recipe, the data, the model it starts from, or the checkpoint to resume is missing.
    ValueError
        If the recipe or the data is wrong, the output folder already holds a run and ``resume`` is off, or
        either has changed since the run was begun.
    FloatingPointError
        If a gradient stops being finite; the last checkpoint stays good.
    OSError
        If a checkpoint cannot be written; the one before stays good.
    """
    recipe = Recipe.read(recipe_path)
    if allow_changes and not resume:
        raise ValueError("--allow-changes is for --resume: a run that begins has nothing to change")
    checkpoint = _checkpoint(recipe.run.output, resume)
    record = Record(recipe_path, recipe)
    changes = _changes(record, allow_changes) if resume else []
    _clear_what_was_cut_off(recipe.run.output)
    stage = stages.build(recipe)
    data = feed(recipe, stage.model, stage.processor)
    trainer = _trainer(recipe, stage, data)
    _keep(record, trainer, checkpoint, changes)
    bar = Bar(recipe.stage.name)
    trainer.add_callback(bar)
    try:
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    finally:
        bar.close()
    stage = _gathered(trainer, recipe, stage)
    if trainer.is_world_process_zero():
        _tell(stage, trainer)
        stage.finish(_unseen(recipe, data, stage.model.device), recipe.run.output / MODEL)
        for reason in trainer.skipped.reasons:
            print(f"skipped: {reason}", file=sys.stderr)
        for reason in trainer.skipped.cuts:
            print(f"cut: {reason}", file=sys.stderr)
        for name, number in trainer.skipped.numbers().items():
            print(f"{name.replace('_', ' ')}: {number}", file=sys.stderr)
    trainer.accelerator.wait_for_everyone()
    return recipe.run.output / MODEL


def dry_run(recipe_path: Path) -> Plan:
    """Return what :func:`train` would do: parameters, tokens, steps, memory; nothing is written.

    Of the model, configs and processor are read, and no weights.
    """
    recipe = Recipe.read(recipe_path)
    stage = stages.build(recipe, load_skeleton)
    return Plan.of(recipe, stage.objective, feed(recipe, stage.model, stage.processor))


def _checkpoint(output: Path, resume: bool) -> Path | None:
    """Return the checkpoint to resume; refuse an output folder in use."""
    checkpoint = last_checkpoint(output)
    if resume and checkpoint is None:
        raise FileNotFoundError(
            f"{output}: no complete checkpoint to resume; remove the folder and run without --resume"
        )
    if not resume and output.exists() and any(path.name not in KEPT for path in output.iterdir()):
        advice = go_on(output, "pass --resume, or remove the folder")
        raise ValueError(f"{output}: holds an earlier run; {advice}")
    return checkpoint


def _changes(record: Record, allowed: bool) -> list[str]:
    """Return what has changed since the run was begun; refuse that unless it is allowed."""
    changes = record.differences()
    if changes and not allowed:
        raise ValueError(
            f"{record.folder}: this would resume it with another recipe or other data: {'; '.join(changes)}; "
            "put back what was, or pass --allow-changes"
        )
    return changes


def _clear_what_was_cut_off(output: Path) -> None:
    for folder in output.glob("checkpoint-*"):
        if not (folder / COMPLETE).exists():
            shutil.rmtree(folder, ignore_errors=True)  # another process may have been faster


def _keep(record: Record, trainer: SparseTrainer, checkpoint: Path | None, changes: list[str]) -> None:
    """Let the first process write what the run is begun, or goes on, with."""
    trainer.accelerator.wait_for_everyone()  # each has looked into the folder before
    if not trainer.is_world_process_zero() or (checkpoint is not None and not changes):
        return
    for change in changes:
        print(f"changed: {change}", file=sys.stderr)
    record.keep(None if checkpoint is None else step_of(checkpoint))


def _trainer(recipe: Recipe, stage: stages.Stage, data: Feed) -> SparseTrainer:
    run, evaluation = recipe.run, recipe.evaluation
    arguments = TrainingArguments(
        output_dir=str(run.output),
        max_steps=run.steps or -1,
        num_train_epochs=run.epochs,
        per_device_train_batch_size=recipe.data.batch_size,
        per_device_eval_batch_size=recipe.data.batch_size,
        gradient_accumulation_steps=recipe.data.accumulate,
        dataloader_num_workers=recipe.data.workers,
        dataloader_pin_memory=torch.cuda.is_available(),
        bf16=run.precision == "bfloat16",
        use_cpu=not torch.accelerator.is_available(),
        max_grad_norm=recipe.optimizer.clip_norm,
        seed=run.seed,
        logging_steps=run.log_every,
        logging_nan_inf_filter=False,
        save_steps=run.save_every,
        save_total_limit=run.keep_checkpoints,
        eval_strategy="no" if evaluation is None else "steps",
        eval_steps=None if evaluation is None else evaluation.every,
        load_best_model_at_end=evaluation is not None,
        metric_for_best_model=None if evaluation is None else "eval_loss",
        greater_is_better=False,
        prediction_loss_only=True,
        report_to=list(run.report_to) or "none",
        disable_tqdm=True,
        remove_unused_columns=False,
        # A batch without pictures leaves the image predictor without a gradient.
        ddp_find_unused_parameters=recipe.stage.name == "dynamic",
    )
    if arguments.n_gpu > 1:
        raise ValueError(
            "several GPUs and one process: start it with accelerate launch -m dynamic_llava train RECIPE, or "
            "set CUDA_VISIBLE_DEVICES to one of them"
        )
    order = data.order(arguments.world_size)
    trainer = SparseTrainer(
        recipe,
        order,
        model=stage.objective,
        args=arguments,
        train_dataset=data.train,
        eval_dataset=data.evaluation,
        data_collator=data.collate,
        callbacks=[Schedules(stage.objective, order), Log(run.output / LOG)],
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def _gathered(trainer: SparseTrainer, recipe: Recipe, stage: stages.Stage) -> stages.Stage:
    """Return the trained stage in one piece: itself, or a copy of what several processes hold in parts."""
    if not (trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled):
        trainer.accelerator.unwrap_model(trainer.model_wrapped, keep_fp32_wrapper=False)
        return stage
    state = trainer.accelerator.get_state_dict(trainer.model_wrapped)
    if trainer.is_world_process_zero():
        stage = stages.build(recipe)
        stage.objective.load_state_dict(state)
    return stage


def _tell(stage: stages.Stage, trainer: SparseTrainer) -> None:
    """Let the predictors, where there are any, keep what they were trained with."""
    sparsifier = sparsifier_of(stage.model)
    if sparsifier is not None:
        state = trainer.state
        sparsifier.history = history(stage.recipe, state.global_step, state.log_history)


def _unseen(recipe: Recipe, data: Feed, device: torch.device) -> Iterator[Mapping[str, Any]]:
    """Yield the groups that the output predictor's threshold is set on."""
    loader = DataLoader(data.unseen, batch_size=recipe.data.batch_size, collate_fn=data.collate)
    for batch in islice(loader, recipe.calibration_steps):
        for group in batch["groups"]:
            yield {name: value.to(device) for name, value in group.items()}
