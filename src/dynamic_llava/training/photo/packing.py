"""Packed rows of a tree: a picture, questions about it, and answers to each that do not see each other.

A picture is encoded and attended to once, a question that has five answers is read once. Each token attends
to the tokens on its way to the root, and its position continues theirs, as if each answer stood alone.

Legend: B rows, N tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor
from transformers import LlavaProcessor

from dynamic_llava.chat.prompt import PLACEHOLDER, chat_answer, chat_prompt
from dynamic_llava.data.training import IGNORE

ROOT = 0  # number of the question, and of the answer, of what stands before them


@dataclass(frozen=True)
class Asked:
    """A question with its answers; those of a ``long`` one may lose tokens in the dynamic stage."""

    question: str
    answers: tuple[str, ...]
    long: bool = False


@dataclass(frozen=True)
class Shown:
    """A row: a picture, or None for text alone, whether it is mirrored, and what is asked."""

    path: Path | None
    mirrored: bool
    asked: tuple[Asked, ...]


@dataclass
class _Row:
    ids: list[int] = field(default_factory=list)
    questions: list[int] = field(default_factory=list)
    answers: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    long: list[bool] = field(default_factory=list)

    def add(
        self, ids: Sequence[int], place: tuple[int, int], start: int, is_answer: bool, long: bool
    ) -> None:
        """Append tokens of one node of the tree: ``place`` is its question and its answer."""
        self.ids.extend(ids)
        self.questions.extend([place[0]] * len(ids))
        self.answers.extend([place[1]] * len(ids))
        self.positions.extend(range(start, start + len(ids)))
        self.labels.extend(ids if is_answer else [IGNORE] * len(ids))
        self.long.extend([long and is_answer] * len(ids))


class TreePacker:
    """Turns pictures and what is asked about them into batches of packed rows.

    Parameters
    ----------
    processor
        Supplies the tokenizer and the chat template.
    tokens
        Image tokens of a picture.
    """

    def __init__(self, processor: LlavaProcessor, tokens: int) -> None:
        self.processor = processor
        self.tokens = tokens
        self._pad: int = processor.tokenizer.pad_token_id

    def __call__(self, shown: Sequence[Shown], features: Tensor) -> dict[str, Tensor]:
        """Pack rows, padded on the right to the longest.

        Parameters
        ----------
        shown
            What is asked, about a picture or without one.
        features
            Output of the tower for each picture, in order, [K, 1+I, C].

        Returns
        -------
        dict
            What the model takes (``attention_mask`` is bool [B, 1, N, N]); ``labels``; ``answer_mask``, bool
            [B, N], the tokens of long answers; ``sample``, the rows' numbers.
        """
        rows = [self._row(one.asked, pictures=int(one.path is not None)) for one in shown]
        length = max(len(row.ids) for row in rows)

        def padded(values: list[list[int]] | list[list[bool]], fill: int) -> Tensor:
            return torch.tensor([row + [fill] * (length - len(row)) for row in values])

        return {
            "input_ids": padded([row.ids for row in rows], self._pad),
            "pixel_values": features,
            "attention_mask": _visible(
                padded([row.questions for row in rows], -1), padded([row.answers for row in rows], -1)
            ),
            "position_ids": padded([row.positions for row in rows], 0),
            "labels": padded([row.labels for row in rows], IGNORE),
            "answer_mask": padded([row.long for row in rows], False),
            "sample": torch.arange(len(rows)),
        }

    def _row(self, asked: Sequence[Asked], pictures: int) -> _Row:
        row = _Row()
        for number, one in enumerate(asked, start=1):
            head, request = self._prompt(one.question, pictures)
            if not row.ids:
                row.add(head, (ROOT, ROOT), 0, is_answer=False, long=False)
            row.add(request, (number, ROOT), len(head), is_answer=False, long=False)
            start = len(head) + len(request)
            for place, answer in enumerate(one.answers, start=1):
                spoken = self._answer(one.question, pictures, answer)
                row.add(spoken, (number, place), start, is_answer=True, long=one.long)
        return row

    def _prompt(self, question: str, pictures: int) -> tuple[list[int], list[int]]:
        """Return the tokens up to the picture's end, which all questions share, and those behind."""
        text = chat_prompt(self.processor, question, pictures)
        head, mark, request = text.rpartition(PLACEHOLDER)
        return self._encode(head + mark * self.tokens), self._encode(request)

    def _answer(self, question: str, pictures: int, answer: str) -> list[int]:
        ids = self._encode(chat_answer(self.processor, question, pictures, answer))
        return ids[: ids.index(self.processor.tokenizer.eos_token_id) + 1]

    def _encode(self, text: str) -> list[int]:
        ids: list[int] = self.processor.tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids


def _visible(questions_BN: Tensor, answers_BN: Tensor) -> Tensor:
    """Return what each token attends to, bool [B, 1, N, N]: itself and what lies on its way to the root."""
    same_question_BNN = questions_BN[:, :, None] == questions_BN[:, None, :]
    same_answer_BNN = answers_BN[:, :, None] == answers_BN[:, None, :]
    asked_B1N = answers_BN[:, None, :] == ROOT
    root_B1N = questions_BN[:, None, :] == ROOT
    causal_NN = torch.ones(questions_BN.shape[1], questions_BN.shape[1], dtype=torch.bool).tril()
    return ((root_B1N | (same_question_BNN & (asked_B1N | same_answer_BNN))) & causal_NN)[:, None]
