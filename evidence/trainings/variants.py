"""The trainings that docs/results.md compares: recipes/results/base.yaml with one setting changed each."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import yaml

BASE = Path("recipes") / "results" / "base.yaml"
WORK = Path("runs") / "results"
DIAL = {"image_rates": [0.05, 0.6], "text_rates": [0.2, 0.8]}
HALF_DRAWN = {**DIAL, "drawn_share": 0.5}

VARIANTS: dict[str, dict[str, Any]] = {
    "base": {},
    "base-again": {"seed": 3},  # how far apart trainings with the same settings lie
    "base-third": {"seed": 4},
    "dial": DIAL,
    "predictors": {"train": "predictors"},
    "distilled": {"distill_weight": 0.5},
    "lora": {"train": "lora"},
    "image-10": {"sparsity": {"image_keep_rate": 0.1}},
    "image-50": {"sparsity": {"image_keep_rate": 0.5}},
    "layer-1": {"sparsity": {"layer": 1}},
    "layer-4": {"sparsity": {"layer": 4}},
    "plain-softmax": {"sparsity": {"masked_softmax": False}},
    "unbounded": {"sparsity": {"dropped_key_bound": 1e6}},  # the definition, as in the official code
    "len-0": {"sparsity": {"min_answer_length": 0}},
    "len-100": {"sparsity": {"min_answer_length": 100}},
    "lambda-1": {"sparsity": {"ratio_weight": 1.0}},
    "lambda-10": {"sparsity": {"ratio_weight": 10.0}},
    "lambda-1000": {"sparsity": {"ratio_weight": 1000.0}},
    "image-10-lambda-10": {"sparsity": {"image_keep_rate": 0.1, "ratio_weight": 10.0}},
    "image-50-lambda-10": {"sparsity": {"image_keep_rate": 0.5, "ratio_weight": 10.0}},
    "predictors-distilled": {"train": "predictors", "distill_weight": 1.0},
    "predictors-lambda-10": {"train": "predictors", "sparsity": {"ratio_weight": 10.0}},
    "dial-predictors": {**DIAL, "train": "predictors"},
    "dial-low": {**DIAL, "image_rates": [0.05, 0.3]},
    "dial-low-800": {**DIAL, "image_rates": [0.05, 0.3], "steps": 800},
    "dial-half-drawn": HALF_DRAWN,
    "dial-half-drawn-lambda-10": {**HALF_DRAWN, "sparsity": {"ratio_weight": 10.0}},
    "dial-half-drawn-distilled": {**HALF_DRAWN, "distill_weight": 0.5},
}


def recipe(name: str, folder: Path) -> dict[str, Any]:
    """Return the settings of a variant that trains into ``folder``."""
    settings: dict[str, Any] = yaml.safe_load(BASE.read_text(encoding="utf-8"))
    changes = copy.deepcopy(VARIANTS[name])
    settings["method"]["sparsity"] |= changes.pop("sparsity", {})
    for setting, value in changes.items():
        settings["run" if setting in settings["run"] else "method"][setting] = value
    settings["run"]["output"] = str(folder)
    return settings


def recipe_path(folder: Path) -> Path:
    """Return where the recipe of what trains into ``folder`` lies."""
    return folder.parent / f"{folder.name}.yaml"


def write_recipe(name: str, folder: Path) -> Path:
    """Write the recipe of a variant beside ``folder``; return its path."""
    path = recipe_path(folder)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(recipe(name, folder), sort_keys=False), encoding="utf-8")
    return path
