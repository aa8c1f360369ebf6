"""Asks a model about pictures: chat prompt in, greedy answer and the record of what was kept out."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from PIL import Image
from torch import Tensor
from transformers import BatchFeature, PreTrainedModel, ProcessorMixin
from transformers.generation.streamers import BaseStreamer

from dynamic_llava.chat.images import as_rgb
from dynamic_llava.chat.positions import check_positions, positions_of
from dynamic_llava.chat.prompt import PLACEHOLDER, chat_prompt
from dynamic_llava.core.report import Report
from dynamic_llava.files import first_line
from dynamic_llava.sparsifier import sparsifier_of


@dataclass(frozen=True)
class Reply:
    """What a model answered to one prompt.

    Attributes
    ----------
    text : str
        The answer without special tokens.
    token_ids : list of int
        The generated tokens, end-of-sequence included.
    report : Report or None
        What was kept and saved; None if no sparsifier was attached.
    """

    text: str
    token_ids: list[int]
    report: Report | None


def encode(processor: ProcessorMixin, prompts: Sequence[str], images: Sequence[Image.Image]) -> BatchFeature:
    """Tokenise chat prompts and their pictures, in order, into one left-padded batch.

    Pictures of any mode are seen as `open_image` reads them from a file.

    Raises
    ------
    ValueError
        A picture cannot be used, or the processor cannot, as its files have it.
    """
    begin = processor.tokenizer.bos_token
    seen = [as_rgb(image) for image in images]
    try:
        return processor(
            text=list(prompts),
            images=_by_prompt(processor, prompts, seen) or None,
            padding=True,
            padding_side="left",
            # Some templates write the begin mark themselves, others leave it to the tokenizer.
            add_special_tokens=begin is None or not prompts[0].startswith(begin),
            return_tensors="pt",
            verbose=False,  # `check_positions` says what is too long
        )
    except Exception as error:  # settings in its files that do not go together raise anything
        raise ValueError(
            f"the checkpoint's processor fails on this prompt ({type(error).__name__}: {first_line(error)}); "
            "compare its files with those of the original model"
        ) from error


def _by_prompt(processor: Any, prompts: Sequence[str], images: Sequence[Image.Image]) -> list[Any]:
    """Return each prompt's pictures in a list: LLaVA-OneVision sees one otherwise than one of several."""
    counts = [prompt.count(getattr(processor, "image_token", PLACEHOLDER)) for prompt in prompts]
    if not images or sum(counts) != len(images):
        return list(images)  # the processor says what is wrong
    rest = iter(images)
    return [list(itertools.islice(rest, count)) for count in counts]


def ask(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    prompt: str,
    images: Sequence[Image.Image],
    max_new_tokens: int,
    streamer: BaseStreamer | None = None,
) -> Reply:
    """Answer one prompt greedily.

    Parameters
    ----------
    model, processor
        What `dynamic_llava.load` returns.
    prompt : str
        The user's text, see `chat_prompt`.
    images : sequence of PIL.Image.Image
        The pictures, in the order of their placeholders.
    max_new_tokens : int
        The longest answer.
    streamer : BaseStreamer, optional
        Receives the tokens as they come.

    Raises
    ------
    ValueError
        A picture or the prompt cannot be used, or prompt and answer are longer than the model's positions.
    """
    inputs = encode(processor, [chat_prompt(processor, prompt, len(images))], images).to(model.device)
    check_positions(positions_of(model.config), inputs["input_ids"].shape[1], max_new_tokens)
    sequence_BN = greedy(model, inputs, max_new_tokens, streamer)
    answer = sequence_BN[0].tolist()
    text = processor.decode(answer, skip_special_tokens=True).strip()
    return Reply(text, answer, report_of(model))


def greedy(
    model: PreTrainedModel,
    inputs: BatchFeature,
    max_new_tokens: int,
    streamer: BaseStreamer | None = None,
) -> Tensor:
    """Generate without sampling; return the new tokens only, int64 [B, new tokens]."""
    with torch.inference_mode():
        tokens_BN: Tensor = cast(Any, model).generate(
            **inputs, max_new_tokens=max_new_tokens, do_sample=False, streamer=streamer
        )
    return tokens_BN[:, inputs["input_ids"].shape[1] :]


def report_of(model: PreTrainedModel) -> Report | None:
    """Return the report of the model's last call, or None where no sparsifier is attached."""
    sparsifier = sparsifier_of(model)
    return None if sparsifier is None else sparsifier.report


@contextmanager
def dense(model: PreTrainedModel) -> Iterator[None]:
    """Detach the sparsifier, if there is one, for the length of a block: the stock model, bit for bit."""
    sparsifier = sparsifier_of(model)
    if sparsifier is None:
        yield
        return
    sparsifier.detach()
    try:
        yield
    finally:
        sparsifier.attach(model)
