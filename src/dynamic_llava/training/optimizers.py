"""What is trained at which rate, and the optimizers for it."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from dynamic_llava.training.recipe import OptimizerSettings


class AdamWithMuon(torch.optim.Optimizer):
    """AdamW for some groups and Muon for hidden matrices, as one optimizer.

    Parameters
    ----------
    adam, muon
        The two; their parameter groups stay theirs.
    """

    def __init__(self, adam: torch.optim.AdamW, muon: torch.optim.Muon) -> None:
        self.parts: tuple[torch.optim.Optimizer, ...] = (adam, muon)
        super().__init__([group for part in self.parts for group in part.param_groups], {})

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Take a step of both."""
        for part, groups in zip(self.parts, self._split(), strict=True):
            part.param_groups = groups  # with the learning rates that a scheduler has set
            part.step()

    def state_dict(self) -> dict[str, Any]:
        """Return the state of both."""
        return {"parts": [part.state_dict() for part in self.parts]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take back what :meth:`state_dict` returned."""
        for part, state in zip(self.parts, state_dict["parts"], strict=True):
            part.load_state_dict(state)
        self.param_groups = [group for part in self.parts for group in part.param_groups]

    def _split(self) -> tuple[list[Any], list[Any]]:
        first = len(self.parts[0].param_groups)
        return self.param_groups[:first], self.param_groups[first:]


def parameter_groups(settings: OptimizerSettings, objective: nn.Module) -> list[dict[str, Any]]:
    """Return the trained parameters in groups with their peak rates: model, matrices by Muon, predictors."""
    groups: dict[str, list[nn.Parameter]] = {"model": [], "matrices": [], "predictors": []}
    for name, parameter in objective.named_parameters():
        if not parameter.requires_grad:
            continue
        if ".sparsifier." in name:
            groups["predictors"].append(parameter)
        elif settings.name == "muon" and _is_hidden_matrix(name, parameter):
            groups["matrices"].append(parameter)
        else:
            groups["model"].append(parameter)
    rates = (
        settings.learning_rate,
        settings.matrix_learning_rate,
        settings.predictor_learning_rate,
    )
    named = zip(groups.items(), rates, strict=True)
    return [{"name": name, "params": params, "lr": rate} for (name, params), rate in named if params]


def optimizer(settings: OptimizerSettings, objective: nn.Module) -> torch.optim.Optimizer:
    """Return AdamW, with Muon beside it where the recipe asks for it."""
    groups = parameter_groups(settings, objective)
    matrices = [group for group in groups if group["name"] == "matrices"]
    others = [group for group in groups if group["name"] != "matrices"]
    adam = torch.optim.AdamW(others, betas=(0.9, 0.95), weight_decay=settings.weight_decay)
    if not matrices:
        return adam
    return AdamWithMuon(
        adam,
        torch.optim.Muon(matrices, weight_decay=settings.weight_decay, adjust_lr_fn="match_rms_adamw"),
    )


def schedule(steps: int, warmup: float) -> Callable[[int], float]:
    """Return the factor on the peak rates at a step: linear warm-up, then cosine to zero."""
    warm = max(1, round(warmup * steps))

    def factor(step: int) -> float:
        if step < warm:
            return (step + 1) / warm
        return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))

    return factor


def _is_hidden_matrix(name: str, parameter: nn.Parameter) -> bool:
    return parameter.ndim == 2 and not any(part in name for part in ("embed", "lm_head", "classes"))
