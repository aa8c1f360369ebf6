"""Trains what the evidence is about, if it is not there yet: the dense model, then the variants."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.evidence import variants
from benchmarks.evidence.variants import WORK

DENSE = (
    "nano-vision",
    "nano-dense",
    "nano-places",
    "nano-mixed",
)  # stages of the model that variants start from


def train(names: Sequence[str]) -> Sequence[str]:
    """Train the variants that are not trained yet, the dense model before them; return the names."""
    missing = [name for name in names if not _is_trained(WORK / name)]
    if missing and not _is_trained(Path("runs") / DENSE[-1]):
        for stage in DENSE:
            _train(Path("recipes") / f"{stage}.yaml", Path("runs") / stage)
    for name in missing:
        _train(variants.write_recipe(name, WORK / name), WORK / name)
    return names


def _is_trained(folder: Path) -> bool:
    return (folder / "model").exists()


def _train(recipe: Path, folder: Path) -> None:
    """Train a recipe into ``folder``, going on where an earlier call was stopped."""
    if _is_trained(folder):
        return
    resume = ["--resume"] if any(folder.glob("checkpoint-*/complete")) else []
    command = [sys.executable, "-m", "dynamic_llava", "train", str(recipe), *resume]
    subprocess.run(command, check=True)
