"""Asks a model about pictures: chat prompt in, greedy answer and the record of what was kept out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from PIL import Image
from torch import Tensor
from transformers import BatchFeature, PreTrainedModel, ProcessorMixin
from transformers.generation.streamers import BaseStreamer

from dynamic_llava.core.report import Report

PLACEHOLDER = "<image>"
"""Where a picture stands in a user's prompt; without any, the pictures come first."""


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


def chat_prompt(
    processor: ProcessorMixin, prompt: str, pictures: int, earlier: Sequence[tuple[str, str]] = ()
) -> str:
    """Put a user turn, after ``earlier`` ones, into the checkpoint's chat template, ready for the answer.

    Parameters
    ----------
    processor : ProcessorMixin
        The checkpoint's processor.
    prompt : str
        The user's text. Each ``<image>`` in it stands for one picture, in order.
    pictures : int
        How many pictures come with it; they belong to the first turn.
    earlier : sequence of (str, str)
        Questions and answers of the turns before.

    Raises
    ------
    ValueError
        The prompt is empty, its placeholders do not match the pictures, or there is no chat template.
    """
    return render(processor, _turns(prompt, pictures, earlier), add_generation_prompt=True)


def chat_answer(
    processor: ProcessorMixin,
    prompt: str,
    pictures: int,
    answer: str,
    earlier: Sequence[tuple[str, str]] = (),
) -> str:
    """Return what the chat template puts after `chat_prompt` for ``answer``, with its end mark.

    Raises
    ------
    ValueError
        The template renders the prompt differently once it is answered, or as `chat_prompt` does.
    """
    turns = [*_turns(prompt, pictures, earlier), _assistant_turn(answer)]
    asked, answered = chat_prompt(processor, prompt, pictures, earlier), render(processor, turns)
    if not answered.startswith(asked):
        raise ValueError("the chat template rewrites the prompt once it is answered; it cannot be scored")
    return answered.removeprefix(asked)


def encode(processor: ProcessorMixin, prompts: Sequence[str], images: Sequence[Image.Image]) -> BatchFeature:
    """Tokenise chat prompts and their pictures, in order, into one left-padded batch."""
    begin = processor.tokenizer.bos_token
    return processor(
        text=list(prompts),
        images=list(images) or None,
        padding=True,
        padding_side="left",
        # Some templates write the begin mark themselves, others leave it to the tokenizer.
        add_special_tokens=begin is None or not prompts[0].startswith(begin),
        return_tensors="pt",
    )


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
    """
    inputs = encode(processor, [chat_prompt(processor, prompt, len(images))], images).to(model.device)
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
    sparsifier = getattr(model, "sparsifier", None)
    return None if sparsifier is None else sparsifier.report


@contextmanager
def dense(model: PreTrainedModel) -> Iterator[None]:
    """Detach the sparsifier, if there is one, for the length of a block: the stock model, bit for bit."""
    sparsifier = getattr(model, "sparsifier", None)
    if sparsifier is None:
        yield
        return
    sparsifier.detach()
    try:
        yield
    finally:
        sparsifier.attach(model)


def _turns(prompt: str, pictures: int, earlier: Sequence[tuple[str, str]]) -> list[dict[str, Any]]:
    """Return all turns up to ``prompt``; the pictures go to the first one."""
    turns = []
    for question, answer in earlier:
        turns += [_user_turn(question, pictures), _assistant_turn(answer)]
        pictures = 0
    return [*turns, _user_turn(prompt, pictures)]


def _assistant_turn(answer: str) -> dict[str, Any]:
    return {"role": "assistant", "content": [text_part(answer)]}


def _user_turn(prompt: str, pictures: int) -> dict[str, Any]:
    placeholders = prompt.count(PLACEHOLDER)
    if placeholders not in (0, pictures):
        raise ValueError(
            f"the prompt has {placeholders} {PLACEHOLDER} placeholders for {pictures} pictures; "
            "give one for each picture, or none to put the pictures first"
        )
    if not prompt.replace(PLACEHOLDER, "").strip():
        raise ValueError("the prompt is empty; write a question or a request")
    first, *rest = (prompt if placeholders else PLACEHOLDER * pictures + prompt).split(PLACEHOLDER)
    content = [text_part(first)]
    for text in rest:
        content += [{"type": "image"}, text_part(text)]
    return {"role": "user", "content": [part for part in content if part.get("text") != ""]}


def render(
    processor: ProcessorMixin, turns: list[dict[str, Any]], add_generation_prompt: bool = False
) -> str:
    """Write turns with the checkpoint's chat template; ``ValueError`` where it has none."""
    if processor.chat_template is None:
        raise ValueError("the checkpoint has no chat template; add a chat_template.jinja to its folder")
    text = processor.apply_chat_template(turns, add_generation_prompt=add_generation_prompt, tokenize=False)
    return str(text)


def text_part(text: str) -> dict[str, str]:
    """Return a piece of text as chat templates take it."""
    return {"type": "text", "text": text.strip()}
