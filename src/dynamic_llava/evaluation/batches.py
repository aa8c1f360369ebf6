"""Runs a model over questions in batches and counts the tokens that stay.

Shape suffixes: B batch, N tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor
from transformers import BatchFeature, PreTrainedModel, ProcessorMixin

from dynamic_llava.chat.asking import encode, greedy, report_of
from dynamic_llava.chat.positions import check_positions, positions_of
from dynamic_llava.chat.prompt import chat_answer, chat_prompt
from dynamic_llava.costs.rows import Row
from dynamic_llava.evaluation.tasks import Question

Generate = Callable[[PreTrainedModel, BatchFeature, int], Tensor]
"""Takes a model, a batch of prompts and the longest answer; returns the new tokens, int64 [B, new tokens]."""


@dataclass
class Kept:
    """Counts of image tokens and of output tokens that were fed back, and of those that stayed.

    ``rows`` has the same for each answer, ``cut`` counts answers that ran into the limit of their length.
    """

    image: int = 0
    image_kept: int = 0
    output: int = 0
    output_kept: int = 0
    cut: int = 0
    rows: list[Row] = field(default_factory=list)

    def add(
        self,
        model: PreTrainedModel,
        inputs: BatchFeature,
        output_lengths: Sequence[int],
        held: Sequence[Tensor] | None = None,
    ) -> None:
        """Count one batch; without a sparsifier everything stays.

        Parameters
        ----------
        model
            Has just answered ``inputs``.
        inputs
            The prompts of the batch, image tokens expanded.
        output_lengths
            How many output tokens each row really fed back; finished rows of a batch go on with padding.
        held
            Which of them each row held when its answer ended, bool; by default what is held now.
        """
        report = report_of(model)
        if report is not None and held is None:
            held = report.text_kept
        images_held = [] if report is None else report.image_kept
        images_B = (inputs["input_ids"] == model.config.image_token_id).sum(dim=1).tolist()
        prompts_B = inputs["attention_mask"].sum(dim=1).tolist()
        # A pass with masks records no prompt tokens: all of them stay.
        dropped_B = [] if report is None else [int((~kept_N).sum()) for kept_N in report.prompt_kept]
        for row, (images, prompt, length) in enumerate(zip(images_B, prompts_B, output_lengths, strict=True)):
            images_kept, prompt_kept = images, prompt
            kept_T = torch.ones(length, dtype=torch.bool)
            if held is not None:
                images_kept = len(images_held[row])
                prompt_kept -= images - images_kept + (dropped_B[row] if dropped_B else 0)
                kept_T = held[row][:length].cpu()
            self.image += images
            self.image_kept += images_kept
            self.output += length
            self.output_kept += int(kept_T.sum())
            self.rows.append(Row(prompt, prompt_kept, kept_T))

    def shares(self) -> dict[str, float]:
        """Return kept/all for both kinds of tokens."""
        return {
            "image_tokens_kept": round(self.image_kept / max(1, self.image), 4),
            "output_tokens_kept": round(self.output_kept / max(1, self.output), 4),
        }


def batches(questions: Sequence[Question], size: int, title: str) -> Iterator[Sequence[Question]]:
    """Yield the questions in batches, with a progress bar and the time left on stderr."""
    starts = range(0, len(questions), size)
    console = Console(stderr=True)
    for start in track(starts, title, console=console, transient=True, disable=not console.is_terminal):
        yield questions[start : start + size]


def encode_questions(processor: ProcessorMixin, asked: Sequence[Question]) -> BatchFeature:
    """Turn one batch of questions into chat prompts with one picture each, left-padded."""
    prompts = [chat_prompt(processor, question.text, 1, question.earlier) for question in asked]
    return encode(processor, prompts, [question.open_image() for question in asked])


def check_lengths(
    model: PreTrainedModel, processor: ProcessorMixin, questions: Sequence[Question], max_new_tokens: int
) -> None:
    """Refuse questions that the model has no positions for, before any is asked; see `check_positions`.

    Pictures are not opened: each counts as many tokens as the first one.
    """
    first = encode_questions(processor, questions[:1])["input_ids"]
    picture = int((first == model.config.image_token_id).sum())
    for question in questions:
        prompt = chat_prompt(processor, question.text, 1, question.earlier)
        reference = chat_answer(processor, question.text, 1, question.answer, question.earlier)
        asked, answered = (
            processor.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
            for text in (prompt, reference)
        )
        longest = max(len(answered), max_new_tokens)
        check_positions(positions_of(model.config), len(asked) - 1 + picture, longest, question.name)


def check_rows(
    model: PreTrainedModel, asked: Sequence[Question], inputs: BatchFeature, answers_B: Sequence[int]
) -> None:
    """Refuse a batch with a row that, with its answer, is longer than the model's positions."""
    prompts_B = inputs["attention_mask"].sum(dim=1).tolist()
    for question, prompt, new_tokens in zip(asked, prompts_B, answers_B, strict=True):
        check_positions(positions_of(model.config), prompt, new_tokens, question.name)


def answer(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    asked: Sequence[Question],
    kept: Kept,
    max_new_tokens: int | None = None,
    generate: Generate = greedy,
) -> list[str]:
    """Answer one batch greedily, by default as long as its longest reference; count into ``kept``."""
    inputs = encode_questions(processor, asked).to(model.device)
    if max_new_tokens is None:
        references = processor.tokenizer([question.answer for question in asked], add_special_tokens=False)
        # Two more: the leading space may be a token of its own, and a right answer ends with the end mark.
        max_new_tokens = max(len(ids) for ids in references["input_ids"]) + 2
    check_rows(model, asked, inputs, [max_new_tokens] * len(asked))
    sequence_BN = generate(model, inputs, max_new_tokens)
    padding = processor.tokenizer.pad_token_id
    ends = (processor.tokenizer.eos_token_id, padding)
    spoken_BN = sum(sequence_BN == end for end in ends) == 0
    # Every spoken token is fed back, but for the last of a row that ran into the limit.
    spoken_B = spoken_BN.sum(dim=1).tolist()
    fed = [min(count, sequence_BN.shape[1] - 1) for count in spoken_B]
    kept.cut += sum(count == sequence_BN.shape[1] for count in spoken_B)
    kept.add(model, inputs, fed)
    return [text.strip() for text in processor.batch_decode(sequence_BN, skip_special_tokens=True)]
