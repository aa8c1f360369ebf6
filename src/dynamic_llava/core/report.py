"""What a call kept and what that saved.

Legend: B batch, T output tokens fed back.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

from dynamic_llava.config import SparsityConfig
from dynamic_llava.core.record import Record
from dynamic_llava.core.slots import Slots
from dynamic_llava.costs.answer import answer_flops


class Report:
    """The report of one call, or of all calls that share a cache; it goes on with them.

    Parameters
    ----------
    record
        What they wrote down.
    """

    def __init__(self, record: Record) -> None:
        self._record = record

    @property
    def config(self) -> SparsityConfig:
        """Settings of the sparsifier when the record began."""
        return self._record.config

    @property
    def image_scores(self) -> list[list[Tensor]]:
        """Per row, the scores of each picture's image tokens, in order; none where all tokens stayed."""
        return self._record.image_scores

    @property
    def image_kept(self) -> list[Tensor]:
        """Per row, ascending int64 indices of the kept ones among that row's image tokens."""
        none = torch.zeros(0, dtype=torch.long)
        rows = self._record.image_flags or [[] for _ in range(self._batch)]
        return [torch.cat(flags).nonzero()[:, 0] if flags else none for flags in rows]

    @property
    def text_kept(self) -> list[Tensor]:
        """Per row, the bool decision on each generated token that was fed back.

        With a cache: whether it is still there, which a later turn's attention mask may have ended.
        """
        if self._record.slots is not None and self._record.steps:
            return [torch.cat(parts) for parts in zip(*self._answers(), strict=True)]
        return self._by_row(self._record.text_steps)

    @property
    def prompt_kept(self) -> list[Tensor]:
        """Per row, the bool decision on each prompt token that could be dropped (``sparsify_prompt``)."""
        return self._by_row(self._record.prompt_steps)

    @property
    def prompt_decisions(self) -> list[tuple[Tensor, Tensor]]:
        """Of each pass that dropped prompt tokens, which stayed and which could go: bool ``[B, N]``."""
        return self._record.prompt_steps

    @property
    def image_flags(self) -> list[list[Tensor]]:
        """Per row, the bool decision on each picture's image tokens, in order."""
        return self._record.image_flags

    @property
    def kv_lengths(self) -> Tensor:
        """Tokens held in the cache now, int64 ``[layers, rows]``; 0 without a cache.

        A layer below l with a sliding window holds that alone; a sparse one holds all that stays.
        """
        if self._record.slots is None:
            return torch.zeros(self._record.shape.layers, self._batch, dtype=torch.long)
        sparse_B, split = self._held_BN().sum(-1).cpu(), self._record.config.layer
        return torch.stack(self._dense_lengths()[:split] + [sparse_B] * (self._record.shape.layers - split))

    def _dense_lengths(self) -> list[Tensor]:
        """Return how many tokens each layer would hold if it were dense, int64 ``[B]``."""
        shape, live_BN = self._record.shape, self._live_BN().cpu()
        # Stock sliding layers keep what the next token sees beside itself.
        return [
            (live_BN if window is None else live_BN[:, -(window - 1) :]).sum(-1)
            for window in shape.windows or (None,) * shape.layers
        ]

    def summary(self) -> dict[str, float]:
        """Return plain numbers, summed over the rows.

        ``*_dense`` is what the model without sparsifier holds or computes for the same tokens;
        ``prefill_flops`` are those of the first pass, predictors included. Decisions on output tokens are
        those of ``text_kept``; ``prompt_tokens`` are only those that could be dropped. Seconds count from the
        making of the cache, pauses between calls included, and end with the last pass that was not compiled.
        """
        record, shape = self._record, self._record.shape
        bytes_per_token = shape.kv_bytes_per_token(record.element_size)
        has_cache = record.slots is not None
        held_dense = sum(int(length_B.sum()) for length_B in self._dense_lengths()) if has_cache else 0
        answers = self._answers() if has_cache and record.steps else []
        prefill, prefill_dense = answer_flops(record.config, shape, record.steps[:1], [], has_cache)
        total, total_dense = answer_flops(record.config, shape, record.steps, answers, has_cache)
        return {
            "image_tokens": sum(len(flag) for flags in self._record.image_flags for flag in flags),
            "image_tokens_kept": sum(len(kept) for kept in self.image_kept),
            "prompt_tokens": sum(len(kept) for kept in self.prompt_kept),
            "prompt_tokens_kept": sum(int(kept.sum()) for kept in self.prompt_kept),
            "output_tokens": sum(len(kept) for kept in self.text_kept),
            "output_tokens_kept": sum(int(kept.sum()) for kept in self.text_kept),
            "kv_bytes": bytes_per_token * int(self.kv_lengths.sum()),
            "kv_bytes_dense": bytes_per_token * held_dense,
            "prefill_flops": prefill,
            "prefill_flops_dense": prefill_dense,
            "decode_flops": total - prefill,
            "decode_flops_dense": total_dense - prefill_dense,
            "prefill_seconds": record.first_ended - record.started,
            "seconds": record.ended - record.started,
        }

    def _by_row(self, steps: list[tuple[Tensor, Tensor]]) -> list[Tensor]:
        if not steps:
            return [torch.zeros(0, dtype=torch.bool) for _ in range(self._batch)]
        kept_BN, counts_BN = (torch.cat(parts, dim=1) for parts in zip(*steps, strict=True))
        return [kept[counts] for kept, counts in zip(kept_BN, counts_BN, strict=True)]

    def _answers(self) -> list[list[Tensor]]:
        """Return which output tokens of each turn stayed in the cache: of each turn and row, bool ``[T]``."""
        held_BN = self._held_BN()
        return [
            [kept_T[: int(length)] for kept_T, length in zip(held_BN[:, start:stop], length_B, strict=True)]
            for (start, stop), length_B in zip(self._turns(), self._lengths(), strict=True)
        ]

    def _turns(self) -> list[tuple[int, int]]:
        """Return between which columns the output tokens of each turn lie."""
        steps = self._record.steps
        ends = [step.columns[0] for step in steps[1:]] + [int(cast(Slots, self._record.slots).fed)]
        return [(step.columns[1], end) for step, end in zip(steps, ends, strict=True)]

    def _lengths(self) -> list[Tensor]:
        """Return how many output tokens of each turn each row has, padding left out: int64 ``[B]`` a turn."""
        slots, found = cast(Slots, self._record.slots), []
        for start, stop in self._turns():
            ids_BT = slots.ids_BT(start, stop)
            known = ids_BT is not None
            whole_B = torch.full((self._batch,), stop - start)
            found.append(self._record.ends.lengths(cast(Tensor, ids_BT)) if known else whole_B)
        return found

    def _live_BN(self) -> Tensor:
        """Return which columns are tokens: neither padding nor fed after the end of an answer."""
        slots = cast(Slots, self._record.slots)
        live_BN = slots.is_token_BN(int(slots.fed))
        for (start, stop), length_B in zip(self._turns(), self._lengths(), strict=True):
            ordinal_T = torch.arange(stop - start, device=live_BN.device)
            live_BN[:, start:stop] &= ordinal_T < length_B.to(live_BN.device)[:, None]
        return live_BN

    def _held_BN(self) -> Tensor:
        """Return which columns the sparse layers hold."""
        slots = cast(Slots, self._record.slots)
        return held(slots, int(slots.fed)) & self._live_BN()

    @property
    def _batch(self) -> int:
        return len(self._record.steps[0].dense_B) if self._record.steps else 0


def held(slots: Slots, columns: int) -> Tensor:
    """Return which of the first ``columns`` fed tokens are held: bool ``[B, columns]``."""
    column_BS = slots.column_BS.masked_fill(~slots.valid_BS, columns)
    held_BN = slots.valid_BS.new_zeros(len(column_BS), columns + 1)
    return held_BN.scatter_(1, column_BS, True)[:, :columns]
