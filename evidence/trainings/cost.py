"""What a training step costs: variants in turns, in one process, on the same data."""

from __future__ import annotations

import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
from evidence.trainings import variants

from dynamic_llava.training import optimizers, stages
from dynamic_llava.training.feeding import feed
from dynamic_llava.training.recipe import Recipe

COMPARED = ("base", "predictors", "lora", "distilled")
ROUNDS = 8


def measure() -> dict[str, dict[str, float]]:
    """Return for each variant the trained parameters, and median, least and greatest seconds a step."""
    steps = {name: _Step(name) for name in COMPARED}
    times: dict[str, list[float]] = {name: [] for name in COMPARED}
    for number in range(ROUNDS + 1):
        for name, step in steps.items():
            seconds = step(number)
            if number:  # the first one warms up
                times[name].append(seconds)
    return {
        name: {
            "trained_parameters": steps[name].trained,
            "seconds": round(median(found), 4),
            "least": round(min(found), 4),
            "greatest": round(max(found), 4),
            "of_base": round(median(a / b for a, b in zip(found, times["base"], strict=True)), 4),
        }
        for name, found in times.items()
    }


class _Step:
    def __init__(self, name: str) -> None:
        recipe = Recipe(**_settings(name))
        self.stage = stages.build(recipe)
        self.objective = self.stage.objective.train()
        self.optimizer = optimizers.optimizer(recipe.optimizer, self.objective)
        self.data = feed(recipe, self.stage.model, self.stage.processor)
        groups = optimizers.parameter_groups(recipe.optimizer, self.objective)
        self.trained = sum(p.numel() for group in groups for p in group["params"])
        self.dtype = getattr(torch, recipe.run.precision)

    def __call__(self, number: int) -> float:
        groups = self.data.train[number]
        start = time.perf_counter()
        self.objective.begin_step(number, ROUNDS + 1)
        with torch.autocast("cpu", self.dtype, enabled=self.dtype != torch.float32):
            loss, _ = self.objective(groups, self.objective.counts(groups))
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return time.perf_counter() - start


def _settings(name: str) -> dict[str, Any]:
    return variants.recipe(name, Path("unused"))
