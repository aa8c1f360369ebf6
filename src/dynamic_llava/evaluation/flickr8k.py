"""Captions of Flickr8k's test split: one sentence a picture against the five that people wrote."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, ProcessorMixin

from dynamic_llava.chat.images import open_image
from dynamic_llava.data.photographs import CAPTION_REQUESTS, captioned
from dynamic_llava.evaluation.batches import Kept, answer, batches
from dynamic_llava.evaluation.scorers import Scorers, examples, means
from dynamic_llava.evaluation.tasks import Question

MAX_NEW_TOKENS = 40
"""Longest caption; people's are 11 words long on average."""


def questions(captions: Path) -> list[Question]:
    """Return the request for a caption of each picture of the test split.

    Parameters
    ----------
    captions
        ``captions.jsonl``, see :mod:`dynamic_llava.data.photographs`.
    """
    return [
        Question(
            partial(open_image, picture.path),
            CAPTION_REQUESTS[0],
            picture.captions[0],
            "caption",
            references=picture.captions,
            name=str(picture.path),
            picture=picture.path.name,
        )
        for picture in captioned(captions, "test")
    ]


def measure(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    asked: Sequence[Question],
    batch_size: int,
    max_new_tokens: int,
) -> dict[str, Any]:
    """Caption all pictures greedily.

    Returns
    -------
    dict
        ``bleu_1``, ``bleu_4``, ``meteor``, ``rouge_l`` and ``cider`` in percent, the kept shares, and the
        answers with their scores as ``examples``.
    """
    scorers, kept, answers = Scorers(), Kept(), list[str]()
    for some in batches(asked, batch_size, "captions"):
        answers += answer(model, processor, some, kept, max_new_tokens)
    references = [question.references for question in asked]
    scores = scorers(answers, references)
    return {
        **scorers.bleu(answers, references),
        **means(scores),
        "meteor_matching": scorers.meteor.matching,
        **kept.shares(),
        "examples": examples([question.picture for question in asked], answers, references, scores),
    }
