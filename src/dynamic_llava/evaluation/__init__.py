"""Measures a model on a task; every number names the command, versions, machine and seed it came from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, ProcessorMixin

from dynamic_llava.environment import environment
from dynamic_llava.evaluation import accuracy, descriptions, generation
from dynamic_llava.evaluation.references import references
from dynamic_llava.evaluation.tables import table
from dynamic_llava.evaluation.tasks import Question, questions
from dynamic_llava.sparsifier import sparsifier_of

__all__ = ["evaluate", "table"]


def evaluate(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    task: str,
    *,
    limit: int | None = None,
    batch_size: int = 64,
    seed: int = 0,
    data: Path | None = None,
    images: Path | None = None,
    max_new_tokens: int | None = None,
) -> dict[str, Any]:
    """Measure a model on a task.

    Parameters
    ----------
    model, processor
        What `dynamic_llava.load` returns; a detached sparsifier measures the dense model.
    task : str
        ``easy-vqa``, ``scenes``, ``descriptions`` or ``generation``.
    limit : int, optional
        Ask only the first questions.
    batch_size : int
        Questions answered at once.
    seed : int
        First seed of random dropping (``descriptions``).
    data, images : Path, optional
        File of long answers and folder of their pictures (``generation``), see `references`.
    max_new_tokens : int, optional
        Longest generated answer (``generation``); default `generation.MAX_NEW_TOKENS`.

    Returns
    -------
    dict
        ``task``, ``questions``, ``batch_size``, ``seed``, ``sparsity`` (the config, None if dense),
        ``numbers``, and `environment`.

    Raises
    ------
    ValueError
        There is no such task, or it needs other arguments.
    """
    asked = _asked(task, limit, data, images, max_new_tokens)
    model.eval()
    if task == "descriptions":
        numbers = descriptions.measure(model, processor, asked, batch_size, seed)
    elif task == "generation":
        longest = max_new_tokens or generation.MAX_NEW_TOKENS
        numbers = generation.measure(model, processor, asked, batch_size, longest)
    else:
        numbers = accuracy.measure(model, processor, asked, batch_size)
    sparsifier = sparsifier_of(model)
    return {
        "task": task,
        "questions": len(asked),
        "batch_size": batch_size,
        "seed": seed,
        "sparsity": None if sparsifier is None else sparsifier.config.to_dict(),
        "numbers": numbers,
        "dtype": str(model.dtype).removeprefix("torch."),
        **environment(model.device),
    }


def _asked(
    task: str, limit: int | None, data: Path | None, images: Path | None, max_new_tokens: int | None
) -> list[Question]:
    if task == "generation":
        if data is None or images is None:
            raise ValueError("task generation needs --data, a file of long answers, and --images, a folder")
        return references(data, images)[:limit]
    if any(option is not None for option in (data, images, max_new_tokens)):
        raise ValueError(f"--data, --images and --max-new-tokens go with task generation, not with {task}")
    return questions(task, limit)
