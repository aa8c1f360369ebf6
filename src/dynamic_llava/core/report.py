"""What a call kept and what that saved. A report only observes: no computation depends on it.

Legend: B batch, K pictures, I image tokens, N tokens, T output tokens fed back.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor

from dynamic_llava.config import SparsityConfig
from dynamic_llava.costs.answer import Step, answer_flops
from dynamic_llava.costs.flops import DecoderShape

if TYPE_CHECKING:
    from dynamic_llava.core.slots import Slots


class Report:
    """The record of one call, or of all calls that share a cache.

    Parameters
    ----------
    config
        Settings of the sparsifier when the record began.
    shape
        Sizes of the decoder.
    element_size
        Bytes of one number in the K/V cache.

    Attributes
    ----------
    image_scores
        Per row, the policy's scores of each picture's image tokens, in order; none where all tokens stayed.
    slots
        Those of the cache; None without one. They also tell which output tokens stayed: decoding records
        nothing else, so that its step has nothing to do on the host.
    """

    def __init__(self, config: SparsityConfig, shape: DecoderShape, element_size: int) -> None:
        self.config = config
        self.shape = shape
        self.element_size = element_size
        self.slots: Slots | None = None
        self.image_flags: list[list[Tensor]] = []
        self.image_scores: list[list[Tensor]] = []
        self.text_steps: list[tuple[Tensor, Tensor]] = []
        self.prompt_steps: list[tuple[Tensor, Tensor]] = []
        self.steps: list[Step] = []
        self._scored: list[int] = []  # sizes of the pictures that the step under way scored
        self._judged = 0  # tokens that it decided on
        self._started = time.perf_counter()
        self._first_ended = self._ended = self._started

    def fresh(self) -> Report:
        """Return an empty report of the same settings."""
        return Report(self.config, self.shape, self.element_size)

    def add_step(self, dense_B: Tensor, sparse_B: Tensor, held_B: Tensor, columns: tuple[int, int]) -> None:
        """Record what a prompt kept; without a cache, what any pass did. See :class:`Step`."""
        self.steps.append(Step(dense_B, sparse_B, held_B, columns, tuple(self._scored), self._judged))
        self._scored, self._judged = [], 0

    def end_pass(self) -> None:
        """Note the time; a compiled step cannot."""
        if torch.compiler.is_compiling():
            return
        self._ended = time.perf_counter()
        if self._first_ended == self._started:
            self._first_ended = self._ended

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
                self._scored.append(len(kept_I))

    def add_text(self, kept_BT: Tensor, valid_BT: Tensor | None = None) -> None:
        """Record a pass without a cache: decisions on output tokens; ``valid_BT`` tells them from padding."""
        valid_BT = torch.ones_like(kept_BT) if valid_BT is None else valid_BT
        self.text_steps.append((kept_BT, valid_BT))
        if self.config.sparsify_text:
            self._judged += kept_BT.numel()

    def add_prompt(self, kept_BN: Tensor, droppable_BN: Tensor) -> None:
        """Record decisions on the prompt tokens that may be dropped."""
        self.prompt_steps.append((kept_BN, droppable_BN))
        self._judged += kept_BN.numel()

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

    @property
    def image_kept(self) -> list[Tensor]:
        """Per row, ascending int64 indices of the kept ones among that row's image tokens."""
        none = torch.zeros(0, dtype=torch.long)
        rows = self.image_flags or [[] for _ in range(self._batch)]
        return [torch.cat(flags).nonzero()[:, 0] if flags else none for flags in rows]

    @property
    def text_kept(self) -> list[Tensor]:
        """Per row, the bool decision on each generated token that was fed back.

        With a cache: whether it is still there, which a later turn's attention mask may have ended.
        """
        if self.slots is not None and self.steps:
            return list(torch.cat(self._answers(), dim=1))
        return self._by_row(self.text_steps)

    @property
    def prompt_kept(self) -> list[Tensor]:
        """Per row, the bool decision on each prompt token that could be dropped (``sparsify_prompt``)."""
        return self._by_row(self.prompt_steps)

    @property
    def kv_lengths(self) -> Tensor:
        """Tokens held in the cache now, int64 ``[layers, rows]``; 0 without a cache."""
        if self.slots is None:
            return torch.zeros(self.shape.layers, self._batch, dtype=torch.long)
        dense_B, sparse_B = self.slots.fed_B().cpu(), self.slots.tokens_B().cpu()
        split = self.config.layer
        return torch.stack([dense_B] * split + [sparse_B] * (self.shape.layers - split))

    def summary(self) -> dict[str, float]:
        """Return plain numbers, summed over the rows.

        ``*_dense`` is what the model without sparsifier holds or computes for the same tokens;
        ``prefill_flops`` are those of the first pass, predictors included. Decisions on output tokens are
        those of ``text_kept``; ``prompt_tokens`` are only those that could be dropped. Seconds count from the
        making of the cache, pauses between calls included, and end with the last pass that was not compiled.
        """
        bytes_per_token = self.shape.kv_bytes_per_token(self.element_size)
        lengths = self.kv_lengths
        answers = self._answers() if self.slots is not None and self.steps else []
        has_cache = self.slots is not None
        prefill, prefill_dense = answer_flops(self.config, self.shape, self.steps[:1], [], has_cache)
        total, total_dense = answer_flops(self.config, self.shape, self.steps, answers, has_cache)
        return {
            "image_tokens": sum(len(flag) for flags in self.image_flags for flag in flags),
            "image_tokens_kept": sum(len(kept) for kept in self.image_kept),
            "prompt_tokens": sum(len(kept) for kept in self.prompt_kept),
            "prompt_tokens_kept": sum(int(kept.sum()) for kept in self.prompt_kept),
            "output_tokens": sum(len(kept) for kept in self.text_kept),
            "output_tokens_kept": sum(int(kept.sum()) for kept in self.text_kept),
            "kv_bytes": bytes_per_token * int(lengths.sum()),
            "kv_bytes_dense": bytes_per_token * self.shape.layers * int(lengths[0].sum()),
            "prefill_flops": prefill,
            "prefill_flops_dense": prefill_dense,
            "decode_flops": total - prefill,
            "decode_flops_dense": total_dense - prefill_dense,
            "prefill_seconds": self._first_ended - self._started,
            "seconds": self._ended - self._started,
        }

    def _by_row(self, steps: list[tuple[Tensor, Tensor]]) -> list[Tensor]:
        if not steps:
            return [torch.zeros(0, dtype=torch.bool) for _ in range(self._batch)]
        kept_BN, counts_BN = (torch.cat(parts, dim=1) for parts in zip(*steps, strict=True))
        return [kept[counts] for kept, counts in zip(kept_BN, counts_BN, strict=True)]

    def _answers(self) -> list[Tensor]:
        """Return which output tokens of each turn stayed in the cache: bool ``[B, T]`` a turn."""
        slots = cast("Slots", self.slots)
        fed = int(slots.fed)
        held_BN = slots.holds(fed)
        ends = [step.columns[0] for step in self.steps[1:]] + [fed]
        return [held_BN[:, step.columns[1] : end] for step, end in zip(self.steps, ends, strict=True)]

    @property
    def _batch(self) -> int:
        return len(self.steps[0].dense_B) if self.steps else 0
