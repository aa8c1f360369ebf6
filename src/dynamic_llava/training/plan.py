"""What a recipe will do, before it does: parameters, tokens, steps, and an estimate of the memory."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from rich.table import Table
from torch import nn

from dynamic_llava.training import optimizers
from dynamic_llava.training.feeding import Feed
from dynamic_llava.training.recipe import Recipe
from dynamic_llava.training.stages.objective import Objective

SAMPLES = 8  # of the data, looked at for the number of tokens
GIB = 2**30


@dataclass(frozen=True)
class Plan:
    """A training in numbers.

    Attributes
    ----------
    parameters
        Trained parameters of each group, with its peak learning rate.
    frozen
        Parameters that are not trained.
    samples, steps
        Items of the data, and optimizer steps of one process.
    tokens_per_sample
        Mean over the first samples; a drawn step counts as one.
    memory_bytes
        Weights, gradients, optimizer state, and activations by a rule of thumb; ``total`` is their sum.
    """

    parameters: dict[str, tuple[int, float]]
    frozen: int
    samples: int
    steps: int
    tokens_per_sample: float
    memory_bytes: dict[str, int]

    @classmethod
    def of(cls, recipe: Recipe, objective: Objective, data: Feed) -> Plan:
        """Count; nothing is computed."""
        groups = optimizers.parameter_groups(recipe.optimizer, objective)
        parameters = {
            group["name"]: (sum(p.numel() for p in group["params"]), group["lr"]) for group in groups
        }
        frozen = sum(p.numel() for p in objective.parameters() if not p.requires_grad)
        samples = len(data.train)  # type: ignore[arg-type]
        looked = [data.collate([data.train[i]]) for i in range(min(SAMPLES, samples))]
        tokens = [sum(_tokens(group) for group in batch["groups"]) for batch in looked]
        mean = sum(tokens) / max(1, len(tokens))
        per_step = recipe.data.batch_size * recipe.data.accumulate
        steps = recipe.run.steps or max(1, round(samples * recipe.run.epochs / per_step))
        memory = _memory(recipe, objective, groups, mean * recipe.data.batch_size)
        return cls(parameters, frozen, samples, steps, round(mean, 1), memory)

    def as_json(self) -> dict[str, Any]:
        """Plain values by name."""
        return asdict(self)

    def tables(self) -> list[Table]:
        """Return what to show: parameters, then the run."""
        groups = Table("group", "parameters", "peak learning rate", title="parameters")
        for name, (number, rate) in self.parameters.items():
            groups.add_row(name, f"{number:,}", f"{rate:g}")
        groups.add_row("frozen", f"{self.frozen:,}", "-")
        run = Table("", "", title="run", show_header=False)
        run.add_row("samples", f"{self.samples:,}")
        run.add_row("optimizer steps", f"{self.steps:,}")
        run.add_row("tokens a sample", f"{self.tokens_per_sample:,}")
        for name, number in self.memory_bytes.items():
            run.add_row(f"memory: {name}", f"{number / GIB:,.2f} GiB")
        return [groups, run]


def _tokens(group: Any) -> int:
    """Tokens of a group's rows, padding included; pictures alone count as rows."""
    ids = group.get("input_ids")
    return len(group["labels"]) if ids is None else ids.numel()


def _memory(
    recipe: Recipe, objective: nn.Module, groups: list[dict[str, Any]], tokens: float
) -> dict[str, int]:
    """Estimate the peak of one process, in bytes, nothing sharded."""
    trained = [p for group in groups for p in group["params"]]
    states = {"matrices": 1}  # Muon has one moment, AdamW two
    optimizer = sum(
        states.get(group["name"], 2) * sum(p.numel() * p.element_size() for p in group["params"])
        for group in groups
    )
    memory = {
        "weights": sum(p.numel() * p.element_size() for p in objective.parameters()),
        "gradients": sum(p.numel() * p.element_size() for p in trained),
        "optimizer": optimizer,
        "activations": _activations(recipe, objective, tokens),
    }
    return memory | {"total": sum(memory.values())}


def _activations(recipe: Recipe, objective: nn.Module, tokens: float) -> int:
    """Estimate kept activations: 34 numbers a channel and layer (Korthikanti et al. 2022, without N x N)."""
    config = getattr(getattr(objective, "model", None), "config", None)
    text = getattr(config, "text_config", None)
    if text is None:
        return 0
    dtype = recipe.run.precision if recipe.run.precision == "bfloat16" else recipe.stage.init_dtype
    size = getattr(torch, dtype).itemsize
    one_layer = 34 * tokens * text.hidden_size * size / 2  # their count is in bytes of 16-bit numbers
    if not recipe.run.gradient_checkpointing:
        return round(one_layer * text.num_hidden_layers)
    return round(one_layer + tokens * text.hidden_size * size * text.num_hidden_layers)
