"""Quality and cost of long descriptions when output tokens leave the K/V cache.

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

from dynamic_llava.chat.asking import dense, greedy, report_of
from dynamic_llava.costs.rows import Row, mean_costs
from dynamic_llava.costs.shape import DecoderShape
from dynamic_llava.evaluation.batches import Generate, Kept, answer, batches
from dynamic_llava.evaluation.intervals import accuracy
from dynamic_llava.evaluation.meteor import Meteor
from dynamic_llava.evaluation.scoring import score
from dynamic_llava.evaluation.tasks import Question
from dynamic_llava.sparsifier import Sparsifier, sparsifier_of

RANDOM_SEEDS = 3
AVERAGED = (
    "perplexity",
    "meteor",
    "accuracy",
    "image_tokens_kept",
    "output_tokens_kept",
    "mean_answer_tokens",
    "cut_answers",
    "decode_tflops_paper",
    "decode_tflops",
    "kv_bytes",
)
"""What the entry of the seeds of ``random`` has as their mean."""


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
        For each setting what `numbers_of` returns; ``random`` has the mean over seeds and each.
    """
    questions = by_length(questions)

    def under(setting: Setting) -> dict[str, Any]:
        return numbers_of(run_setting(model, processor, questions, batch_size, setting), questions)

    numbers = {"dense": under(Setting("dense", None))}
    if sparsifier_of(model) is None:
        return numbers

    def measured(name: str, **changes: Any) -> dict[str, Any]:
        return under(Setting(name, changes))

    numbers["image"] = measured("image", sparsify_text=False)
    numbers["image+text"] = measured("image+text")
    # A policy that drops everything is compared as well, and a keep rate is never 0.
    share = max(numbers["image+text"]["teacher_forced"]["output_tokens_kept"], 1e-4)
    numbers["image+uniform"] = measured("image+uniform", text_policy="uniform", text_keep_rate=share)
    runs = [
        measured(f"image+random, seed {number}", text_policy="random", text_keep_rate=share, seed=number)
        for number in range(seed, seed + RANDOM_SEEDS)
    ]
    mean = {name: round(fmean(run[name] for run in runs), 9) for name in AVERAGED}
    numbers["image+random"] = {**mean, "seeds": list(range(seed, seed + RANDOM_SEEDS)), "runs": runs}
    return numbers


def by_length(questions: Sequence[Question]) -> list[Question]:
    """Sort by the references' lengths: less padding, less waiting."""
    return sorted(questions, key=lambda question: len(question.answer))


@dataclass(frozen=True)
class Run:
    """One setting's answers to all questions, how likely it found the references, and what both cost."""

    texts: list[str]
    loss_B: Tensor
    length_B: Tensor
    scored: Kept
    generated: Kept
    scored_costs: dict[str, float]
    generated_costs: dict[str, float]


def run_setting(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    questions: Sequence[Question],
    batch_size: int,
    setting: Setting,
    max_new_tokens: int | None = None,
    generate: Generate = greedy,
) -> Run:
    """Answer all questions and score all references under one setting."""
    texts: list[str] = []
    losses: list[Tensor] = []
    lengths: list[Tensor] = []
    scored, generated = Kept(), Kept()
    with setting.applied(model):
        for asked in batches(questions, batch_size, setting.name):
            loss_B, length_B = score(model, processor, asked, scored)
            losses.append(loss_B)
            lengths.append(length_B)
            texts += answer(model, processor, asked, generated, max_new_tokens, generate)
        generated_costs, scored_costs = (mean_costs_of(model, kept.rows) for kept in (generated, scored))
    return Run(texts, torch.cat(losses), torch.cat(lengths), scored, generated, scored_costs, generated_costs)


def numbers_of(run: Run, questions: Sequence[Question]) -> dict[str, Any]:
    """Return the numbers of one setting.

    Returns
    -------
    dict
        ``perplexity`` (mean over descriptions, as the paper counts) and ``perplexity_of_all_tokens``, both
        teacher-forced on the references; ``accuracy`` with counts and interval: greedy descriptions equal to
        their reference; kept shares while generating, and while scoring under ``teacher_forced``; ``meteor``
        (mean over descriptions, and how words were matched); `mean_costs` of the generated answers and of the
        references under ``teacher_forced_costs``, where dense and sparse decode the same tokens;
        ``mean_answer_tokens`` without end marks, and how many of the answers were cut at ``max_new_tokens``.
    """
    meteor = Meteor()
    pairs = [(text, question.answer) for text, question in zip(run.texts, questions, strict=True)]
    loss, length, generated = run.loss_B, run.length_B, run.generated
    return {
        "perplexity": round((loss / length).exp().mean().item(), 5),
        "perplexity_of_all_tokens": round((loss.sum() / length.sum()).exp().item(), 5),
        **accuracy(sum(text == reference.strip() for text, reference in pairs), len(questions)),
        **generated.shares(),
        "teacher_forced": run.scored.shares(),
        "reference_tokens": int(length.sum()),
        "meteor": round(fmean(meteor(text, reference) for text, reference in pairs), 5),
        "meteor_matching": meteor.matching,
        "mean_answer_tokens": round((generated.output + generated.cut) / len(questions), 3),
        "cut_answers": generated.cut,
        **run.generated_costs,
        "teacher_forced_costs": run.scored_costs,
    }


def mean_costs_of(model: PreTrainedModel, rows: Sequence[Row]) -> dict[str, float]:
    """Return what ``rows`` cost the model as it stands, dense or sparse."""
    report = report_of(model)
    shape = DecoderShape.from_config(model.config.get_text_config())
    return mean_costs(None if report is None else report.config, shape, model.dtype.itemsize, rows)


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
