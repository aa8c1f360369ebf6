"""Measures a model on a task; every number names the command, versions, machine and seed it came from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, ProcessorMixin

from dynamic_llava.evaluation import accuracy, descriptions
from dynamic_llava.evaluation.results import environment
from dynamic_llava.evaluation.tables import table
from dynamic_llava.evaluation.tasks import questions

RESULTS = Path("benchmarks") / "results"

__all__ = ["default_output", "evaluate", "table"]


def evaluate(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    task: str,
    *,
    limit: int | None = None,
    batch_size: int = 64,
    seed: int = 0,
) -> dict[str, Any]:
    """Measure a model on a task.

    Parameters
    ----------
    model, processor
        What `dynamic_llava.load` returns; a detached sparsifier measures the dense model.
    task : str
        ``easy-vqa``, ``scenes`` or ``descriptions``.
    limit : int, optional
        Ask only the first questions.
    batch_size : int
        Questions answered at once.
    seed : int
        First seed of random dropping (``descriptions``).

    Returns
    -------
    dict
        ``task``, ``questions``, ``batch_size``, ``seed``, ``sparsity`` (the config, None if dense),
        ``numbers``, and `environment`.

    Raises
    ------
    ValueError
        There is no such task.
    """
    asked = questions(task, limit)
    model.eval()
    if task == "descriptions":
        numbers = descriptions.measure(model, processor, asked, batch_size, seed)
    else:
        numbers = accuracy.measure(model, processor, asked, batch_size)
    sparsifier = getattr(model, "sparsifier", None)
    return {
        "task": task,
        "questions": len(asked),
        "batch_size": batch_size,
        "seed": seed,
        "sparsity": None if sparsifier is None else sparsifier.config.to_dict(),
        "numbers": numbers,
        **environment(model.device),
    }


def default_output(task: str, model: str, dense: bool, limit: int | None) -> Path | None:
    """Return where a full result belongs, or None: limited runs and other folders keep nothing unasked."""
    if limit is not None or not RESULTS.is_dir():
        return None
    return RESULTS / f"{task}-{Path(model).name}-{'dense' if dense else 'sparse'}.json"
