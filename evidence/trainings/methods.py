"""The methods that docs/results.md compares, and how one is measured at one budget."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel, ProcessorMixin

from dynamic_llava.evaluation.accuracy import normalised
from dynamic_llava.evaluation.batches import Kept, answer, batches
from dynamic_llava.evaluation.descriptions import configured
from dynamic_llava.evaluation.scoring import score
from dynamic_llava.evaluation.tasks import Question
from dynamic_llava.methods.downsample import downsampled

BATCH = 50


@dataclass(frozen=True)
class Method:
    """What decides on image tokens and what on output tokens; ``downsample`` is a smaller picture."""

    image: str
    text: str


METHODS = {
    "learned": Method("learned", "learned"),
    "random": Method("random", "random"),
    "uniform": Method("uniform", "uniform"),
    "fastv + h2o": Method("fastv", "h2o"),
    "downsample + streaming": Method("downsample", "streaming"),
}
OUTPUT_POLICIES = ("learned", "random", "uniform", "h2o", "streaming")


@dataclass(frozen=True)
class Budget:
    """Keep rates; 1 drops nothing."""

    image: float = 1.0
    text: float = 1.0


@contextmanager
def working(
    model: PreTrainedModel, processor: ProcessorMixin, method: Method, budget: Budget, seed: int
) -> Iterator[ProcessorMixin]:
    """Let ``model`` drop tokens in one way; yield the processor to ask with."""
    changes: dict[str, Any] = {
        "sparsify_image": budget.image < 1 and method.image != "downsample",
        "sparsify_text": budget.text < 1,
        "image_keep_rate": budget.image,
        "text_keep_rate": budget.text,
        "image_policy": "uniform" if method.image == "downsample" else method.image,
        "text_policy": method.text,
        "seed": seed,
    }
    with ExitStack() as stack:
        stack.enter_context(configured(model, changes))
        if method.image == "downsample" and budget.image < 1:
            processor = stack.enter_context(downsampled(model, processor, budget.image))
        yield processor


def share_of_picture(processor: ProcessorMixin, adapted: ProcessorMixin) -> float:
    """Return how much of the patches of a picture is left where ``adapted`` makes smaller ones."""
    before, after = (each.image_processor.size["height"] for each in (processor, adapted))
    return float(after / before) ** 2


def accuracy(
    model: PreTrainedModel, processor: ProcessorMixin, questions: Sequence[Question]
) -> dict[str, float]:
    """Answer short questions; return right answers, all of them, and the share of image tokens kept."""
    right, kept = 0, Kept()
    for asked in batches(questions, 2 * BATCH, "questions"):
        texts = answer(model, processor, asked, kept)
        right += sum(
            normalised(text) == normalised(question.answer)
            for text, question in zip(texts, asked, strict=True)
        )
    return {"right": right, "total": len(questions), **kept.shares()}


def perplexity(
    model: PreTrainedModel, processor: ProcessorMixin, questions: Sequence[Question]
) -> dict[str, Any]:
    """Score reference descriptions; return the log-perplexity of each, and the shares kept."""
    kept = Kept()
    logs: list[float] = []
    for asked in batches(sorted(questions, key=lambda q: len(q.answer)), BATCH, "descriptions"):
        loss_B, length_B = score(model, processor, asked, kept)
        logs += (loss_B / length_B).tolist()
    return {"perplexity": torch.tensor(logs).exp().mean().item(), "total": len(logs), **kept.shares()}


def exactness(
    model: PreTrainedModel, processor: ProcessorMixin, questions: Sequence[Question]
) -> dict[str, float]:
    """Generate descriptions; return how many equal their reference."""
    kept, right = Kept(), 0
    for asked in batches(sorted(questions, key=lambda q: len(q.answer)), BATCH, "generating"):
        texts = answer(model, processor, asked, kept)
        right += sum(text == question.answer.strip() for text, question in zip(texts, asked, strict=True))
    return {"right": right, "total": len(questions), **kept.shares()}
