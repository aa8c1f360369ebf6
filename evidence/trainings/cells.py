"""Cells of the tables: one method at one budget on one seed's scenes, measured once and kept in a file."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from evidence.trainings import methods
from evidence.trainings.methods import METHODS, Budget, Method
from evidence.trainings.variants import WORK
from transformers import PreTrainedModel, ProcessorMixin

import dynamic_llava
from dynamic_llava.evaluation import tasks
from dynamic_llava.files import write_json

SCENES, QUESTIONS = 60, 300  # of each seed: its own held-out scenes
BUNDLED = Path(dynamic_llava.__file__).parent / "models" / "nano"


class Measuring:
    """Measures one model; cells of other weights under the same name are never taken for its own.

    Parameters
    ----------
    source
        The model: ``nano`` or the name of a variant.
    cells
        Folder of what was measured before; by default that of all commits, for the numbers are the weights'.
    """

    def __init__(self, source: str, cells: Path = WORK / "cells") -> None:
        self._source = source
        self._folder = BUNDLED if source == "nano" else WORK / source / "model"
        self._cells = cells / f"{source}-{fingerprint(self._folder)}"

    def cell(self, kind: str, method_name: str, method: Method, budget: Budget, seed: int) -> dict[str, Any]:
        """Return one measurement: ``kind`` is accuracy, perplexity or exactness."""
        name = f"{kind} {method_name} {budget.image:g} {budget.text:g} {seed}".replace(" ", "_")
        path = self._cells / f"{name}.json"
        if not path.exists():
            write_json(path, self._measure(kind, method, budget, seed))
        return json.loads(path.read_text(encoding="utf-8"))

    def dense(self, kind: str, seed: int) -> dict[str, Any]:
        """Return a measurement with nothing dropped."""
        return self.cell(kind, "dense", METHODS["uniform"], Budget(), seed)

    @cached_property
    def _loaded(self) -> tuple[PreTrainedModel, ProcessorMixin]:
        model, processor = dynamic_llava.load(self._folder, dtype=torch.float32)
        assert processor is not None  # all that is measured here brings its own
        return model, processor

    def _measure(self, kind: str, method: Method, budget: Budget, seed: int) -> dict[str, Any]:
        model, processor = self._loaded
        print(f"{self._source}: {kind}, {method.image}/{method.text}, {budget}, seed {seed}", file=sys.stderr)
        measure: Callable[..., dict[str, Any]] = getattr(methods, kind)
        with methods.working(model, processor, method, budget, seed) as adapted:
            measured = measure(model, adapted, questions(kind, seed))
        share = methods.share_of_picture(processor, adapted)
        return {**measured, "image_tokens_kept": round(share * measured["image_tokens_kept"], 4)}


def questions(kind: str, seed: int) -> list[tasks.Question]:
    """Return what a seed asks: every seed has held-out scenes of its own."""
    first = seed * SCENES
    if kind != "accuracy":
        return tasks.scene_descriptions(first + SCENES)[first:]
    asked = tasks.scene_questions(first + SCENES)[len(tasks.scene_questions(first)) :]
    return asked[:QUESTIONS]


def fingerprint(folder: Path) -> str:
    """Return eight hexadecimal digits that change with a model's weights and settings."""
    digest = sha256()
    for path in sorted(path for path in folder.iterdir() if path.suffix in {".json", ".safetensors"}):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()[:8]
