"""Runs a model over questions in batches and counts the tokens that stay.

Shape suffixes: B batch, N tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.progress import track
from transformers import BatchFeature, PreTrainedModel, ProcessorMixin

from dynamic_llava.chat import chat_prompt, encode, greedy, report_of
from dynamic_llava.evaluation.tasks import Question


@dataclass
class Kept:
    """Counts of image tokens and of output tokens that were fed back, and of those that stayed."""

    image: int = 0
    image_kept: int = 0
    output: int = 0
    output_kept: int = 0

    def add(self, model: PreTrainedModel, inputs: BatchFeature, output_lengths: Sequence[int]) -> None:
        """Count one batch; without a sparsifier everything stays.

        Parameters
        ----------
        model
            Has just answered ``inputs``.
        inputs
            The batch, image tokens expanded.
        output_lengths
            How many output tokens each row really fed back; finished rows of a batch go on with padding.
        """
        images = int((inputs["input_ids"] == model.config.image_token_id).sum())
        outputs = sum(output_lengths)
        report = report_of(model)
        self.image += images
        self.output += outputs
        if report is None:
            self.image_kept += images
            self.output_kept += outputs
            return
        self.image_kept += sum(len(kept) for kept in report.image_kept)
        rows = zip(report.text_kept, output_lengths, strict=True)
        self.output_kept += sum(int(kept[:length].sum()) for kept, length in rows)

    def shares(self) -> dict[str, float]:
        """Return kept/all for both kinds of tokens."""
        return {
            "image_tokens_kept": round(self.image_kept / max(1, self.image), 4),
            "output_tokens_kept": round(self.output_kept / max(1, self.output), 4),
        }


def batches(questions: Sequence[Question], size: int, title: str) -> Iterator[Sequence[Question]]:
    """Yield the questions in batches, with a progress bar and the time left on stderr."""
    starts = range(0, len(questions), size)
    for start in track(starts, title, console=Console(stderr=True), transient=True):
        yield questions[start : start + size]


def encode_questions(processor: ProcessorMixin, asked: Sequence[Question]) -> BatchFeature:
    """Turn one batch of questions into chat prompts with one picture each, left-padded."""
    prompts = [chat_prompt(processor, question.text, pictures=1) for question in asked]
    return encode(processor, prompts, [question.open_image() for question in asked])


def answer(
    model: PreTrainedModel, processor: ProcessorMixin, asked: Sequence[Question], kept: Kept
) -> list[str]:
    """Answer one batch greedily, as long as its longest reference; count what stayed in ``kept``."""
    inputs = encode_questions(processor, asked).to(model.device)
    references = processor.tokenizer([question.answer for question in asked], add_special_tokens=False)
    longest = max(len(ids) for ids in references["input_ids"])
    # Two more: the leading space may be a token of its own, and a right answer ends with the end mark.
    sequence_BN = greedy(model, inputs, max_new_tokens=longest + 2)
    padding = processor.tokenizer.pad_token_id
    ends = (processor.tokenizer.eos_token_id, padding)
    spoken_BN = sum(sequence_BN == end for end in ends) == 0
    # Every spoken token is fed back, but for the last of a row that ran into the limit.
    fed = [min(int(count), sequence_BN.shape[1] - 1) for count in spoken_BN.sum(dim=1)]
    kept.add(model, inputs, fed)
    return [text.strip() for text in processor.batch_decode(sequence_BN, skip_special_tokens=True)]
