"""Long answers, dense and sparse side by side: what they say, how likely references are, what it takes.

Each setting is measured in one run: quality, the time of the prefill and of a token, and the bytes of the K/V
cache, held and allocated.

Shape suffixes: B batch, N tokens.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from statistics import fmean, median
from typing import Any, cast

import torch
from torch import Tensor
from transformers import BatchFeature, PreTrainedModel, ProcessorMixin
from transformers.generation.streamers import BaseStreamer

from dynamic_llava.chat.images import open_image
from dynamic_llava.data.photographs import DESCRIPTION_REQUESTS, captioned
from dynamic_llava.evaluation.batches import check_lengths
from dynamic_llava.evaluation.descriptions import Setting, by_length, numbers_of, run_setting
from dynamic_llava.evaluation.references import references, sentences
from dynamic_llava.evaluation.scorers import Scorers, examples, means
from dynamic_llava.evaluation.tasks import Question
from dynamic_llava.sparsifier import sparsifier_of

MAX_NEW_TOKENS = 1024
"""Longest generated answer unless told otherwise, as in the official METEOR script."""
WORDS_TOGETHER = 4  # repetition counts runs of so many words


class Clock(BaseStreamer):
    """Takes the time at which each token of a batch is known, and that at which it was made."""

    def __init__(self) -> None:
        self.started = time.perf_counter()
        self.times: list[float] = []

    def put(self, value: Tensor) -> None:
        """Note the time: first that of the prompt, then that of each token."""
        self.times.append(time.perf_counter())

    def end(self) -> None:
        """Nothing is left to do."""

    @property
    def prefill(self) -> float:
        """Seconds from the call to the first token; the tower is part of it.

        Some versions of transformers run the tower before they hand on the prompt.
        """
        return self.times[1] - self.started

    @property
    def per_token(self) -> list[float]:
        """Seconds of each later token of the batch."""
        return [after - before for before, after in zip(self.times[1:-1], self.times[2:], strict=True)]


def questions(data: Path, images: Path | None) -> list[Question]:
    """Return the questions of a file with long references.

    Parameters
    ----------
    data
        What `references` reads, or captions in Flickr8k's layout: the captions of each picture of the test
        split, one after the other, are then its reference.
    images
        Folder of the pictures; that of ``data`` by default.
    """
    try:
        pictures = captioned(data, "test")
    except ValueError:
        return references(data, images or data.parent)
    return [
        Question(
            partial(open_image, picture.path),
            DESCRIPTION_REQUESTS[0],
            " ".join(picture.captions),
            "generation",
            references=picture.captions,
            name=str(picture.path),
            picture=picture.path.name,
        )
        for picture in pictures
    ]


def measure(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    asked: Sequence[Question],
    batch_size: int,
    max_new_tokens: int,
) -> dict[str, Any]:
    """Measure ``dense``, and ``sparse`` where the model has a sparsifier.

    Returns
    -------
    dict
        For each what `numbers_of` returns, and ``cider`` and ``repetition``, see `said`; ``prefill_ms`` and
        ``token_ms``, medians over batches and over tokens of a batch of ``batch_size``, the first batch left
        out where there are more; ``kv_bytes_allocated`` an answer, beside ``kv_bytes``, what is held; and
        ``examples``.

    Raises
    ------
    ValueError
        A question and its answer are longer than the model's positions.
    """
    check_lengths(model, processor, asked, max_new_tokens)
    settings = [Setting("dense", None)]
    if sparsifier_of(model) is not None:
        settings.append(Setting("sparse"))
    ordered = by_length(asked)
    numbers = {}
    for setting in settings:
        timed = Timed()
        run = run_setting(model, processor, ordered, batch_size, setting, max_new_tokens, timed)
        numbers[setting.name] = {**numbers_of(run, ordered), **said(run.texts, ordered), **timed.numbers()}
    return numbers


def said(texts: Sequence[str], asked: Sequence[Question]) -> dict[str, Any]:
    """Judge what long answers say.

    Returns
    -------
    dict
        ``cider``: each sentence against the sentences of its reference, mean over an answer's sentences, then
        over answers, in percent; ``repetition``: share of runs of four words that an answer had before, in
        percent; both in ``examples``, too. Without pycocoevalcap there is no ``cider``.
    """
    repeated = [_repetition(text) for text in texts]
    found: dict[str, list[float]] = {"repetition": repeated}
    if find_spec("pycocoevalcap") is not None:
        found["cider"] = _cider(texts, asked)
    references = [question.references for question in asked]
    return {
        **means(found),
        "examples": examples([question.picture for question in asked], texts, references, found),
    }


class Timed:
    """Generates greedily and notes the time of every token and the size of every cache."""

    def __init__(self) -> None:
        self.clocks: list[Clock] = []
        self.allocated: list[float] = []

    def __call__(self, model: PreTrainedModel, inputs: BatchFeature, max_new_tokens: int) -> Tensor:
        """Return the new tokens, int64 [B, new tokens]."""
        clock = Clock()
        with torch.inference_mode():
            out = cast(Any, model).generate(
                **inputs,
                max_new_tokens=max_new_tokens,
                do_sample=False,
                streamer=clock,
                return_dict_in_generate=True,
            )
        rows, prompt = inputs["input_ids"].shape
        self.clocks.append(clock)
        layers = [layer for layer in out.past_key_values.layers if layer.is_initialized]
        self.allocated.append(
            sum(part.nbytes for layer in layers for part in (layer.keys, layer.values)) / rows
        )
        return cast(Tensor, out.sequences[:, prompt:])

    def numbers(self) -> dict[str, float]:
        """Return medians of the times, in milliseconds, and the mean of the bytes."""
        warm = self.clocks[1:] or self.clocks
        tokens = [seconds for clock in warm for seconds in clock.per_token]
        return {
            "prefill_ms": round(1e3 * median(clock.prefill for clock in warm), 2),
            "token_ms": round(1e3 * median(tokens), 2) if tokens else 0.0,
            "kv_bytes_allocated": round(fmean(self.allocated)),
        }


def _cider(texts: Sequence[str], asked: Sequence[Question]) -> list[float]:
    """Return the mean CIDEr of each answer's sentences."""
    parts = [sentences(text) or [""] for text in texts]
    references = [question.references for question, its in zip(asked, parts, strict=True) for _ in its]
    scores = iter(Scorers().cider([part for its in parts for part in its], references))
    return [fmean(next(scores) for _ in its) for its in parts]


def _repetition(text: str) -> float:
    """Return the share of runs of words that occurred before."""
    words = text.casefold().split()
    runs = [tuple(words[start : start + WORDS_TOGETHER]) for start in range(len(words) - WORDS_TOGETHER + 1)]
    return 1 - len(set(runs)) / len(runs) if runs else 0.0
