"""What passes write down. It only observes: no computation depends on it.

Legend: B batch, K pictures, I image tokens, N tokens, T output tokens fed back.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dynamic_llava.config import SparsityConfig
from dynamic_llava.core.ends import Ends
from dynamic_llava.costs.shape import DecoderShape
from dynamic_llava.costs.step import Step

if TYPE_CHECKING:
    from dynamic_llava.core.slots import Slots


class Record:
    """What one call did, or all calls that share a cache: what a ``Report`` is read from.

    Parameters
    ----------
    config
        Settings of the sparsifier when the record began.
    shape
        Sizes of the decoder.
    element_size
        Bytes of one number in the K/V cache.
    ends
        Which ids end an answer.

    Attributes
    ----------
    image_scores
        Per row, the policy's scores of each picture's image tokens, in order; none where all tokens stayed.
    slots
        Those of the cache; None without one. They also tell which output tokens stayed: decoding records
        nothing else, so that its step has nothing to do on the host.
    """

    def __init__(self, config: SparsityConfig, shape: DecoderShape, element_size: int, ends: Ends) -> None:
        self.config = config
        self.shape = shape
        self.element_size = element_size
        self.ends = ends
        self.slots: Slots | None = None
        self.image_flags: list[list[Tensor]] = []
        self.image_scores: list[list[Tensor]] = []
        self.text_steps: list[tuple[Tensor, Tensor]] = []
        self.prompt_steps: list[tuple[Tensor, Tensor]] = []
        self.steps: list[Step] = []
        self.scored: list[int] = []  # sizes of the pictures that the step under way scored
        self.judged = 0  # tokens that it decided on
        self.finished: set[int] = (
            set()
        )  # rows that it computed though they had ended: their work is not counted
        self.started = time.perf_counter()
        self.first_ended = self.ended = self.started

    def fresh(self) -> Record:
        """Return an empty report of the same settings."""
        return Record(self.config, self.shape, self.element_size, self.ends)

    def add_step(self, dense_B: Tensor, sparse_B: Tensor, held_B: Tensor, columns: tuple[int, int]) -> None:
        """Record what a prompt kept; without a cache, what any pass did. See :class:`Step`."""
        self.steps.append(Step(dense_B, sparse_B, held_B, columns, tuple(self.scored), self.judged))
        self.scored, self.judged = [], 0

    def end_pass(self) -> None:
        """Note the time; a compiled step cannot."""
        if torch.compiler.is_compiling():
            return
        self.ended = time.perf_counter()
        if self.first_ended == self.started:
            self.first_ended = self.ended

    def add_images(
        self, rows_K: Sequence[int], batch: int, decided: Sequence[tuple[Tensor, Tensor | None]]
    ) -> None:
        """Record which image tokens of each picture stay, and their scores; ``rows_K`` has its row."""
        self.image_flags = self.image_flags or [[] for _ in range(batch)]
        self.image_scores = self.image_scores or [[] for _ in range(batch)]
        for row, (kept_I, scores_I) in zip(rows_K, decided, strict=True):
            self.image_flags[row].append(kept_I)
            if scores_I is not None:
                self.image_scores[row].append(scores_I)
                self.scored += [len(kept_I)] * (row not in self.finished)

    def add_text(self, kept_BT: Tensor, valid_BT: Tensor | None = None) -> None:
        """Record a pass without a cache: decisions on output tokens; ``valid_BT`` tells them from padding."""
        valid_BT = torch.ones_like(kept_BT) if valid_BT is None else valid_BT
        self.text_steps.append((kept_BT, valid_BT))
        if self.config.sparsify_text:
            self._count(valid_BT)

    def add_prompt(self, kept_BN: Tensor, droppable_BN: Tensor) -> None:
        """Record decisions on the prompt tokens that may be dropped."""
        self.prompt_steps.append((kept_BN, droppable_BN))
        self._count(droppable_BN)

    def _count(self, decided_BN: Tensor) -> None:
        """Count decisions, those on finished rows left out."""
        self.judged += sum(
            int(row_N.sum()) for row, row_N in enumerate(decided_BN) if row not in self.finished
        )

    def forget_decisions(self) -> None:
        """Drop the recorded decisions: a pass that recomputes everything takes them all again."""
        self.image_flags, self.image_scores, self.text_steps, self.prompt_steps = [], [], [], []

    def select_rows(self, index: Tensor) -> None:
        """Follow the cache when its rows are reordered, repeated or removed."""
        if self.image_flags:
            self.image_flags = [list(self.image_flags[row]) for row in index.tolist()]
            self.image_scores = [list(self.image_scores[row]) for row in index.tolist()]
        self.text_steps = [(kept[index], valid[index]) for kept, valid in self.text_steps]
        self.prompt_steps = [(kept[index], droppable[index]) for kept, droppable in self.prompt_steps]
        self.steps = [step.select_rows(index) for step in self.steps]
