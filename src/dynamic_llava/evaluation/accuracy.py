"""Accuracy of short answers, overall and for each kind of question."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedModel, ProcessorMixin

from dynamic_llava.evaluation.batches import Kept, answer, batches
from dynamic_llava.evaluation.intervals import accuracy
from dynamic_llava.evaluation.tasks import Question


def measure(
    model: PreTrainedModel, processor: ProcessorMixin, questions: Sequence[Question], batch_size: int
) -> dict[str, Any]:
    """Answer all questions greedily and compare with the references.

    An answer is right if it equals its reference but for case, surrounding space and a final full stop.

    Returns
    -------
    dict
        ``accuracy`` with counts and interval, the same for each kind under ``kinds``, and the kept shares.
    """
    right: Counter[str] = Counter()
    total: Counter[str] = Counter()
    kept = Kept()
    for asked in batches(questions, batch_size, "questions"):
        for question, text in zip(asked, answer(model, processor, asked, kept), strict=True):
            total[question.kind] += 1
            right[question.kind] += normalised(text) == normalised(question.answer)
    kinds = {kind: accuracy(right[kind], total[kind]) for kind in sorted(total)}
    return {**accuracy(right.total(), total.total()), "kinds": kinds, **kept.shares()}


def normalised(answer: str) -> str:
    """Return what of a short answer counts."""
    return answer.strip().removesuffix(".").casefold()
