"""Trains what the evidence is about, if it is not there yet: the dense model, then the variants."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import yaml
from evidence.trainings import variants
from evidence.trainings.variants import WORK

DENSE = ("nano-vision", "nano-dense", "nano-places", "nano-mixed")  # of the model that variants start from


def train(names: Sequence[str]) -> None:
    """Train the variants that are not trained yet, the dense model before them.

    Raises
    ------
    SystemExit
        If a variant was trained with other settings than it has now.
    """
    missing = [name for name in names if not _is_trained(WORK / name)]
    for name in names:
        if name not in missing:
            _check(name)
    if missing:
        train_dense()
    for name in missing:
        _train(variants.write_recipe(name, WORK / name), WORK / name)


def train_dense() -> None:
    """Train the model that variants start from, if it is not there."""
    if not _is_trained(Path("runs") / DENSE[-1]):
        for stage in DENSE:
            _train(Path("recipes") / f"{stage}.yaml", Path("runs") / stage)


def _check(name: str) -> None:
    trained = variants.recipe_path(WORK / name)
    if yaml.safe_load(trained.read_text(encoding="utf-8")) != variants.recipe(name, WORK / name):
        raise SystemExit(
            f"error: {WORK / name}: trained with other settings, those of {trained}; "
            "move the folder away to train it anew"
        )


def _is_trained(folder: Path) -> bool:
    return (folder / "model").exists()


def _train(recipe: Path, folder: Path) -> None:
    """Train a recipe into ``folder``, going on where an earlier call was stopped."""
    if _is_trained(folder):
        return
    resume = ["--resume"] if any(folder.glob("checkpoint-*/complete")) else []
    command = [sys.executable, "-m", "dynamic_llava", "train", str(recipe), *resume]
    subprocess.run(command, check=True)
