"""Quality of long descriptions when output tokens leave the K/V cache: perplexity and exactness.

Shape suffixes: B batch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from statistics import fmean
from typing import Any, cast

import torch
from torch import Tensor
from transformers import PreTrainedModel, ProcessorMixin

from dynamic_llava.chat import dense
from dynamic_llava.evaluation.batches import Kept, answer, batches
from dynamic_llava.evaluation.results import accuracy
from dynamic_llava.evaluation.scoring import score
from dynamic_llava.evaluation.tasks import Question
from dynamic_llava.sparsifier import Sparsifier

RANDOM_SEEDS = 3


@dataclass(frozen=True)
class Setting:
    """One row of the comparison: what changes in the sparsifier's config; None runs the stock model."""

    name: str
    changes: dict[str, Any] | None = field(default_factory=dict)

    def applied(self, model: PreTrainedModel) -> AbstractContextManager[None]:
        """Return a context in which the model works under this setting."""
        return dense(model) if self.changes is None else configured(model, self.changes)


def measure(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    questions: Sequence[Question],
    batch_size: int,
    seed: int,
) -> dict[str, Any]:
    """Compare dense, learned and baseline dropping on the same descriptions.

    The share of output tokens that ``random`` and ``uniform`` keep is the share that the learned policy kept
    in this run. A model without sparsifier is measured dense only.

    Returns
    -------
    dict
        For each setting what `measure_setting` returns; ``random`` has the mean over seeds and each.
    """
    questions = sorted(questions, key=lambda question: len(question.answer))  # less padding, less waiting
    numbers = {"dense": measure_setting(model, processor, questions, batch_size, Setting("dense", None))}
    if getattr(model, "sparsifier", None) is None:
        return numbers

    def measured(name: str, **changes: Any) -> dict[str, Any]:
        return measure_setting(model, processor, questions, batch_size, Setting(name, changes))

    numbers["image"] = measured("image", sparsify_text=False)
    numbers["image+text"] = measured("image+text")
    # A policy that drops everything is compared as well, and a keep rate is never 0.
    share = max(numbers["image+text"]["teacher_forced"]["output_tokens_kept"], 1e-4)
    numbers["image+uniform"] = measured("image+uniform", text_policy="uniform", text_keep_rate=share)
    runs = [
        measured(f"image+random, seed {number}", text_policy="random", text_keep_rate=share, seed=number)
        for number in range(seed, seed + RANDOM_SEEDS)
    ]
    mean = {name: round(fmean(run[name] for run in runs), 4) for name in ("perplexity", "accuracy")}
    numbers["image+random"] = {**mean, "seeds": list(range(seed, seed + RANDOM_SEEDS)), "runs": runs}
    return numbers


def measure_setting(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    questions: Sequence[Question],
    batch_size: int,
    setting: Setting,
) -> dict[str, Any]:
    """Measure one setting.

    Returns
    -------
    dict
        ``perplexity`` (mean over descriptions, as the paper counts) and ``perplexity_of_all_tokens``, both
        teacher-forced on the references; ``accuracy`` with counts and interval: greedy descriptions equal to
        their reference; kept shares while generating, and while scoring under ``teacher_forced``.
    """
    losses: list[Tensor] = []
    lengths: list[Tensor] = []
    right = 0
    scored, generated = Kept(), Kept()
    with setting.applied(model):
        for asked in batches(questions, batch_size, setting.name):
            loss_B, length_B = score(model, processor, asked, scored)
            losses.append(loss_B)
            lengths.append(length_B)
            texts = answer(model, processor, asked, generated)
            right += sum(text == question.answer.strip() for text, question in zip(texts, asked, strict=True))
    loss, length = torch.cat(losses), torch.cat(lengths)
    return {
        "perplexity": round((loss / length).exp().mean().item(), 5),
        "perplexity_of_all_tokens": round((loss.sum() / length.sum()).exp().item(), 5),
        **accuracy(right, len(questions)),
        **generated.shares(),
        "teacher_forced": scored.shares(),
        "reference_tokens": int(length.sum()),
    }


@contextmanager
def configured(model: PreTrainedModel, changes: dict[str, Any]) -> Iterator[None]:
    """Change settings of the attached sparsifier for the length of a block."""
    sparsifier = cast(Sparsifier, model.sparsifier)
    before = sparsifier.config
    sparsifier.config = replace(before, **changes)
    try:
        yield
    finally:
        sparsifier.config = before
