"""The training loop: optimizer, schedule, progress, log, checkpoints that resume exactly."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import nn

from dynamic_llava.training.recipe import Recipe
from dynamic_llava.training.stages import STAGES, Metrics, Stage

CHECKPOINT = "checkpoint.pt"
LOG = "log.jsonl"
MODEL = "model"


def train(recipe_path: Path, resume: bool = False) -> Path:
    """Run one stage and write the finished model.

    Parameters
    ----------
    recipe_path : Path
        A YAML recipe; see :class:`Recipe`.
    resume : bool
        Continue from the last checkpoint in the output folder, as if the run had never stopped.

    Returns
    -------
    Path
        Folder of the finished model.

    Raises
    ------
    FileNotFoundError
        If the recipe, the model it starts from, or the checkpoint to resume is missing.
    ValueError
        If the recipe is wrong, or its output folder already holds a run and ``resume`` is off.
    FloatingPointError
        If the loss or a gradient stops being finite; the last checkpoint stays good.
    """
    recipe = Recipe.read(recipe_path)
    checkpoint = recipe.output / CHECKPOINT
    if resume and not checkpoint.is_file():
        raise FileNotFoundError(f"{checkpoint}: nothing to resume; run without --resume to start")
    if not resume and recipe.output.exists() and any(recipe.output.iterdir()):
        raise ValueError(f"{recipe.output}: holds an earlier run; pass --resume or remove the folder")
    stage = STAGES[recipe.stage](recipe)
    optimizers = _optimizers(recipe, stage)
    recipe.output.mkdir(parents=True, exist_ok=True)
    first = _restore(checkpoint, stage, optimizers) if resume else 0
    with _progress() as progress, (recipe.output / LOG).open("a", encoding="utf-8") as log:
        bar = progress.add_task(recipe.stage, total=recipe.steps, completed=first, shown="")
        for step in range(first, recipe.steps):
            started = time.perf_counter()
            metrics = _step(recipe, stage, optimizers, step)
            metrics["seconds"] = time.perf_counter() - started
            log.write(json.dumps({"step": step, **metrics}) + "\n")
            log.flush()
            progress.update(bar, advance=1, shown="  ".join(f"{k} {v:.3f}" for k, v in metrics.items()))
            if (step + 1) % recipe.save_every == 0:
                _checkpoint(checkpoint, stage, optimizers, step + 1)
    stage.save(recipe.output / MODEL)
    return recipe.output / MODEL


def _step(recipe: Recipe, stage: Stage, optimizers: list[torch.optim.Optimizer], step: int) -> Metrics:
    torch.manual_seed(recipe.seed * 1_000_003 + step)  # the noise of a step depends on the step alone
    factor = _schedule(step, recipe.steps, recipe.warmup)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["peak_lr"] * factor
        optimizer.zero_grad()
    metrics = stage.backward(step)
    norm = nn.utils.clip_grad_norm_([p for _, p in stage.parameters()], recipe.clip_norm)
    if not (math.isfinite(metrics["loss"]) and torch.isfinite(norm)):
        raise FloatingPointError(
            f"{recipe.output}: loss {metrics['loss']} and gradient norm {norm.item()} at step {step};"
            " lower the learning rate and --resume from the last checkpoint"
        )
    for optimizer in optimizers:
        optimizer.step()
    return metrics | {"grad_norm": norm.item()}


def _schedule(step: int, steps: int, warmup: float) -> float:
    """Linear warm-up, then cosine to zero."""
    warm = max(1, round(warmup * steps))
    if step < warm:
        return (step + 1) / warm
    return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))


def _optimizers(recipe: Recipe, stage: Stage) -> list[torch.optim.Optimizer]:
    matrices: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    predictors: list[nn.Parameter] = []
    for name, parameter in stage.parameters():
        if name.startswith("sparsifier."):
            predictors.append(parameter)
        elif recipe.optimizer == "muon" and _is_hidden_matrix(name, parameter):
            matrices.append(parameter)
        else:
            others.append(parameter)
    adam_groups: list[dict[str, Any]] = [
        {"params": others, "peak_lr": recipe.learning_rate},
        {"params": predictors, "peak_lr": recipe.predictor_learning_rate},
    ]
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.AdamW(adam_groups, betas=(0.9, 0.95), weight_decay=recipe.weight_decay)
    ]
    if matrices:
        group = {"params": matrices, "peak_lr": recipe.matrix_learning_rate}
        optimizers.append(
            torch.optim.Muon(
                [group],
                weight_decay=recipe.weight_decay,
                adjust_lr_fn="match_rms_adamw",
            )
        )
    return optimizers


def _is_hidden_matrix(name: str, parameter: nn.Parameter) -> bool:
    return parameter.ndim == 2 and not any(part in name for part in ("embed", "lm_head", "classes"))


def _checkpoint(path: Path, stage: Stage, optimizers: list[torch.optim.Optimizer], step: int) -> None:
    state = {
        "step": step,
        "modules": {name: module.state_dict() for name, module in stage.modules.items()},
        "optimizers": [optimizer.state_dict() for optimizer in optimizers],
    }
    partial = path.with_suffix(".partial")
    torch.save(state, partial)
    partial.replace(path)


def _restore(path: Path, stage: Stage, optimizers: list[torch.optim.Optimizer]) -> int:
    state = torch.load(path, weights_only=True)
    for name, module in stage.modules.items():
        module.load_state_dict(state["modules"][name])
    for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
        optimizer.load_state_dict(saved)
    return int(state["step"])


def _progress() -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=20),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[shown]}"),
        console=Console(stderr=True),
    )
