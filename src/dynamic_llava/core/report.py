"""What a call kept and what that saved. A report only observes: no computation depends on it.

Legend: B batch, K pictures, I image tokens, N tokens, T output tokens fed back.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor

from dynamic_llava import methods
from dynamic_llava.config import SparsityConfig
from dynamic_llava.costs import flops

if TYPE_CHECKING:
    from dynamic_llava.core.slots import Slots


@dataclass(frozen=True)
class Step:
    """A prompt or, without a cache, any pass.

    Its queries in dense and in sparse layers, how many of them the sparse layers hold, and between which
    columns of all that was fed it stood.
    """

    dense_B: Tensor
    sparse_B: Tensor
    held_B: Tensor
    columns: tuple[int, int]


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

    def __init__(self, config: SparsityConfig, shape: flops.DecoderShape, element_size: int) -> None:
        self.config = config
        self.shape = shape
        self.element_size = element_size
        self.slots: Slots | None = None
        self.image_flags: list[list[Tensor]] = []
        self.image_scores: list[list[Tensor]] = []
        self.text_steps: list[tuple[Tensor, Tensor]] = []
        self.prompt_steps: list[tuple[Tensor, Tensor]] = []
        self.steps: list[Step] = []
        self.predictor_flops = [0.0]  # of each step; the last entry is that of the step under way
        self._started = time.perf_counter()
        self._first_ended = self._ended = self._started

    def fresh(self) -> Report:
        """Return an empty report of the same settings."""
        return Report(self.config, self.shape, self.element_size)

    def add_step(self, step: Step) -> None:
        """Record what a prompt kept; without a cache, what any pass did."""
        self.steps.append(step)
        self.predictor_flops.append(0.0)

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
            if scores_I is None:
                continue
            self.image_scores[row].append(scores_I)
            if self.config.image_policy == "learned":
                cost = flops.image_predictor_flops(self.config, self.shape.hidden, len(kept_I))
                self.predictor_flops[-1] += cost

    def add_text(self, kept_BT: Tensor, valid_BT: Tensor | None = None) -> None:
        """Record a pass without a cache: decisions on output tokens; ``valid_BT`` tells them from padding."""
        valid_BT = torch.ones_like(kept_BT) if valid_BT is None else valid_BT
        self.text_steps.append((kept_BT, valid_BT))
        if self.config.sparsify_text:
            self._add_text_flops(kept_BT.numel())

    def add_prompt(self, kept_BN: Tensor, droppable_BN: Tensor) -> None:
        """Record decisions on the prompt tokens that may be dropped."""
        self.prompt_steps.append((kept_BN, droppable_BN))
        self._add_text_flops(kept_BN.numel())

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
        self.steps = [
            Step(s.dense_B[index], s.sparse_B[index], s.held_B[index], s.columns) for s in self.steps
        ]

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
        prefill, prefill_dense = self._flops(self.steps[:1], [])
        total, total_dense = self._flops(
            self.steps, self._answers() if self.slots is not None and self.steps else []
        )
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

    def _add_text_flops(self, tokens: int) -> None:
        if self.config.text_policy == "learned":
            self.predictor_flops[-1] += tokens * flops.text_predictor_flops(self.config, self.shape.hidden)

    @property
    def _batch(self) -> int:
        return len(self.steps[0].dense_B) if self.steps else 0

    def _flops(self, steps: list[Step], answers: list[Tensor]) -> tuple[float, float]:
        """FLOPs of ``steps`` and of decoding ``answers`` after them, sparse (with predictors) and dense."""
        sparse, dense = sum(self.predictor_flops[: len(steps)]), 0.0
        if self.config.sparsify_text and self.config.text_policy == "learned":
            one = flops.text_predictor_flops(self.config, self.shape.hidden)
            sparse += one * sum(kept_BT.numel() for kept_BT in answers)
        for row in range(self._batch):
            sparse_layer, dense_layer = self._layer_flops(steps, answers, row)
            dense += self.shape.layers * dense_layer
            sparse += self.config.layer * dense_layer
            sparse += (self.shape.layers - self.config.layer) * sparse_layer
        return sparse, dense

    def _layer_flops(self, steps: list[Step], answers: list[Tensor], row: int) -> tuple[float, float]:
        """FLOPs of one sparse and of one dense layer for one row."""
        shape = self.shape
        past = held = 0
        sparse = dense = 0.0
        for step, kept_BT in itertools.zip_longest(steps, answers):
            queries, kept = int(step.dense_B[row]), int(step.sparse_B[row])
            dense += shape.layer_flops(queries, past + queries)
            sparse += shape.layer_flops(kept, held + kept)
            if self.slots is None:
                continue
            past, held = past + queries, held + int(step.held_B[row])
            if kept_BT is not None and (tokens := kept_BT.shape[1]):
                kept_T = kept_BT[row].long()
                seen = held + methods.held_before(self.config, kept_BT[row]).double().mean().item() + 1
                dense += shape.layer_flops(tokens, past + (tokens + 1) / 2)
                sparse += shape.layer_flops(tokens, seen)
                past, held = past + tokens, held + int(kept_T.sum())
        return sparse, dense
