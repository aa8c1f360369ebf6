"""Packed rows: one picture, encoded once, and all its turns, none of which sees another.

Each turn attends to the shared prefix (``<s>USER: <image>...``) and to itself, and its positions continue the
prefix, so a packed row trains on exactly what its turns would be as single-turn samples.

Legend: B rows, N tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import LlavaProcessor

from dynamic_llava.data import Sample
from dynamic_llava.data.training import IGNORE


@dataclass(frozen=True)
class _Row:
    ids: list[int]
    segments: list[int]
    positions: list[int]
    labels: list[int]
    weights: list[float]
    answer: list[bool]


class Packer:
    """Turns samples into batches of packed rows.

    Parameters
    ----------
    processor : LlavaProcessor
        Supplies the tokenizer and the image processor.
    short_answer_weight : float
        Loss weight of a token of a short answer; tokens of a description weigh 1.
    """

    def __init__(self, processor: LlavaProcessor, short_answer_weight: float) -> None:
        self.processor = processor
        self.short_answer_weight = short_answer_weight
        side = processor.image_processor.size["height"] // processor.patch_size
        self._prefix = self._encode("<s>USER: " + "<image>" * side**2)
        self._eos: int = processor.tokenizer.eos_token_id
        self._pad: int = processor.tokenizer.pad_token_id

    def __call__(self, samples: Sequence[Sample], numbers: Sequence[int]) -> dict[str, Tensor]:
        """Pack samples, one row each, padded on the right to the longest.

        Returns
        -------
        dict
            What the model takes (``attention_mask`` is bool [B, 1, N, N]); ``labels`` and ``weights``, the
            loss weight of each, [B, N]; ``answer_mask``, bool [B, N], the tokens of the one long answer; and
            ``sample``, the ``numbers`` of the samples, [B].
        """
        rows = [self._row(sample) for sample in samples]
        length = max(len(row.ids) for row in rows)

        def padded(values: list[list[int]], fill: int) -> Tensor:
            return torch.tensor([row + [fill] * (length - len(row)) for row in values])

        segments_BN = padded([row.segments for row in rows], -1)
        own_BNN = segments_BN[:, :, None] == segments_BN[:, None, :]
        prefix_B1N = segments_BN[:, None, :] == 0
        causal_NN = torch.ones(length, length, dtype=torch.bool).tril()
        pixels = self.processor.image_processor(
            [sample.open_image() for sample in samples], return_tensors="pt"
        )
        return {
            "input_ids": padded([row.ids for row in rows], self._pad),
            "pixel_values": pixels["pixel_values"],
            "attention_mask": ((own_BNN | prefix_B1N) & causal_NN)[:, None],
            "position_ids": padded([row.positions for row in rows], 0),
            "labels": padded([row.labels for row in rows], IGNORE),
            "weights": torch.tensor([row.weights + [0.0] * (length - len(row.ids)) for row in rows]),
            "answer_mask": torch.tensor([row.answer + [False] * (length - len(row.ids)) for row in rows]),
            "sample": torch.tensor(numbers),
        }

    def _row(self, sample: Sample) -> _Row:
        start = len(self._prefix)
        row = _Row(
            list(self._prefix),
            [0] * start,
            list(range(start)),
            [IGNORE] * start,
            [0.0] * start,
            [False] * start,
        )
        for segment, turn in enumerate(sample.turns, start=1):
            question = self._encode(f"\n{turn.question} ASSISTANT:")
            answer = [*self._encode(f" {turn.answer}"), self._eos]
            long = turn.kind == "description"
            count = len(question) + len(answer)
            row.ids.extend(question + answer)
            row.segments.extend([segment] * count)
            row.positions.extend(range(start, start + count))
            row.labels.extend([IGNORE] * len(question) + answer)
            row.weights.extend([1.0 if long else self.short_answer_weight] * count)
            row.answer.extend([False] * len(question) + [long] * len(answer))
        return row

    def _encode(self, text: str) -> list[int]:
        ids: list[int] = self.processor.tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids
