"""Measures a model on a task; every number names the command, versions, machine and seed it came from."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, ProcessorMixin

from dynamic_llava.environment import environment
from dynamic_llava.evaluation import accuracy, daquar, descriptions, flickr8k, long_answers
from dynamic_llava.evaluation.tables import table
from dynamic_llava.evaluation.tasks import Question, questions
from dynamic_llava.sparsifier import sparsifier_of

__all__ = ["asked", "evaluate", "longest_answer", "table", "without_examples"]

ALIASES = {"generation": "long-answers"}
FROM_FILES: dict[str, Any] = {"flickr8k": flickr8k, "daquar": daquar, "long-answers": long_answers}
"""Tasks that a user brings the data for."""
MAX_NEW_TOKENS = 256
"""Longest answer to show of the other tasks; they are measured up to the length of their references."""


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
        ``easy-vqa``, ``scenes``, ``descriptions``, ``flickr8k``, ``daquar`` or ``long-answers`` (also called
        ``generation``).
    limit : int, optional
        Ask only the first questions.
    batch_size : int
        Questions answered at once.
    seed : int
        First seed of random dropping (``descriptions``).
    data : Path, optional
        File of ``flickr8k``, ``daquar`` or ``long-answers``, see the ``questions`` of each.
    images : Path, optional
        Folder of the pictures of ``long-answers``; that of ``data`` by default.
    max_new_tokens : int, optional
        Longest answer of these three; by default the ``MAX_NEW_TOKENS`` of each.

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
    task = ALIASES.get(task, task)
    given = asked(task, limit=limit, data=data, images=images, max_new_tokens=max_new_tokens)
    model.eval()
    if task == "descriptions":
        numbers = descriptions.measure(model, processor, given, batch_size, seed)
    elif task in FROM_FILES:
        longest = longest_answer(task, max_new_tokens)
        numbers = FROM_FILES[task].measure(model, processor, given, batch_size, longest)
    else:
        numbers = accuracy.measure(model, processor, given, batch_size)
    sparsifier = sparsifier_of(model)
    return {
        "task": task,
        "questions": len(given),
        "batch_size": batch_size,
        "seed": seed,
        "sparsity": None if sparsifier is None else sparsifier.config.to_dict(),
        "numbers": numbers,
        "dtype": str(model.dtype).removeprefix("torch."),
        **environment(model.device),
    }


def asked(
    task: str,
    *,
    limit: int | None = None,
    data: Path | None = None,
    images: Path | None = None,
    max_new_tokens: int | None = None,
) -> list[Question]:
    """Return the questions of a task; arguments and errors are those of `evaluate`."""
    task = ALIASES.get(task, task)
    if task in FROM_FILES:
        if data is None:
            raise ValueError(f"task {task} needs --data, a JSON or JSONL file")
        if task == "long-answers":
            return long_answers.questions(data, images)[:limit]
        if images is not None:
            raise ValueError(f"--images goes with long-answers; the pictures of {task} lie beside --data")
        return FROM_FILES[task].questions(data)[:limit]
    if any(option is not None for option in (data, images, max_new_tokens)):
        known = ", ".join(FROM_FILES)
        raise ValueError(f"--data, --images and --max-new-tokens go with {known}, not with {task}")
    return questions(task, limit)


def longest_answer(task: str, max_new_tokens: int | None = None) -> int:
    """Return how many tokens an answer of a task may have, where it is not as long as its reference."""
    task = ALIASES.get(task, task)
    return max_new_tokens or (FROM_FILES[task].MAX_NEW_TOKENS if task in FROM_FILES else MAX_NEW_TOKENS)


def without_examples(result: Mapping[str, Any]) -> dict[str, Any]:
    """Return a result without its answers one by one, which are too long for a terminal."""
    return {
        name: without_examples(value) if isinstance(value, dict) else value
        for name, value in result.items()
        if name != "examples"
    }
