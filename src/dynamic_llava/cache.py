"""A K/V cache with two row lengths and an overwritten slot.

All layers < l share one set of row lengths, all layers >= l another. A decoded token is written at slot
``length[row]`` and attends to the valid slots and itself; then the length grows only if the token is kept, so
a dropped token is overwritten by the next. No concatenation, no loop over rows.

Legend: B batch, Q new tokens, S slots, H heads, D head size.
"""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import Tensor
from transformers import Cache
from transformers.cache_utils import CacheLayerMixin

from dynamic_llava.report import Report

BLOCK = 128  # slots that storage grows by; also the steps between two looks at the true lengths


class Stage:
    """Row lengths and valid slots, shared by all layers of a stage.

    Parameters
    ----------
    limit
        Slots that storage has from the start and never more than; None lets it grow in blocks.

    Attributes
    ----------
    length_B
        Next slot of each row, int64.
    valid_BS
        Which slots hold a token; False for padding and for everything from ``length_B`` on.
    column_BS
        Where the token of each slot stood in what was fed, int64.
    used
        Slots that a pass may touch: an upper bound of the lengths that needs no look at the device.
    """

    def __init__(self, limit: int | None = None) -> None:
        self.limit = limit
        self.reset()

    def reset(self) -> None:
        """Forget all tokens and the number of rows."""
        self.length_B = torch.zeros(0, dtype=torch.long)
        self.valid_BS = torch.zeros(0, 0, dtype=torch.bool)
        self.column_BS = torch.zeros(0, 0, dtype=torch.long)
        self.used = 0
        self.even = True  # every row's length is exactly `used`
        self.full = True  # every slot below its row's length is valid
        self.slots_BQ: Tensor | None = None

    @property
    def capacity(self) -> int:
        """Slots that storage has."""
        return self.valid_BS.shape[1]

    def tokens_B(self) -> Tensor:
        """Return how many tokens each row holds."""
        return self.valid_BS.sum(-1)

    def open(self, batch: int, queries: int, valid_BQ: Tensor | None, device: torch.device) -> Tensor | None:
        """Begin a pass of new tokens: make room, and return who sees whom.

        Parameters
        ----------
        batch, queries
            Rows B and new tokens Q of each.
        valid_BQ
            Which of them are tokens and not padding; None where all are.
        device
            Where the keys lie.

        Returns
        -------
        Tensor or None
            Bool ``[B, 1, Q, S]`` over the slots that ``update`` returns; None stands for causal attention in
            an empty cache, or for a single query that sees every slot.
        """
        if self.slots_BQ is not None:
            raise ValueError("an earlier call with this cache failed halfway: reset it or begin a new one")
        if not self.length_B.numel():
            self.length_B = torch.zeros(batch, dtype=torch.long, device=device)
            self.valid_BS = torch.zeros(batch, self.limit or 0, dtype=torch.bool, device=device)
            self.column_BS = torch.zeros_like(self.valid_BS, dtype=torch.long)
        if batch != self.length_B.shape[0]:
            raise ValueError(
                f"past_key_values holds {self.length_B.shape[0]} rows, the call has {batch}: they must agree"
            )
        was_empty = self.used == 0
        self._make_room(queries)
        column_Q = torch.arange(queries, device=device)
        self.slots_BQ = self.length_B[:, None] + column_Q
        if self.full and valid_BQ is None and self.even and (was_empty or queries == 1):
            return None
        offset_BS = torch.arange(self.used, device=device) - self.length_B[:, None]
        new_B1S = (offset_BS >= 0)[:, None]
        if valid_BQ is not None:
            new_B1S = new_B1S & valid_BQ.gather(1, offset_BS.clamp(0, queries - 1))[:, None]
        offset_B1S, column_Q1 = offset_BS[:, None], column_Q[:, None]
        visible_BQS = self.valid_BS[:, None, : self.used] | (new_B1S & (offset_B1S <= column_Q1))
        return visible_BQS[:, None]

    def hide(self, seen_BN: Tensor) -> None:
        """Make the slots of fed tokens that a later mask no longer shows invalid; bool ``[B, columns]``."""
        seen_BS = seen_BN.gather(1, self.column_BS.clamp(max=seen_BN.shape[1] - 1))
        if bool((self.valid_BS & ~seen_BS).any()):
            self.valid_BS = self.valid_BS & seen_BS
            self.full = False

    def extend(self, valid_BQ: Tensor | None, column_BQ: Tensor) -> None:
        """End a pass whose tokens all stay; padding becomes invalid slots."""
        slots_BQ = self._close()
        self.column_BS = self.column_BS.scatter(1, slots_BQ, column_BQ)
        if valid_BQ is None:
            valid_BQ = torch.ones_like(slots_BQ, dtype=torch.bool)
        else:
            self.full = False
        self.valid_BS = self.valid_BS.scatter(1, slots_BQ, valid_BQ)
        self.length_B = self.length_B + slots_BQ.shape[1]

    def keep(self, keep_B: Tensor, column_B1: Tensor) -> None:
        """End a pass of one token a row; where it is not kept, the next one takes its slot."""
        slots_B1 = self._close()
        self.column_BS = self.column_BS.scatter(1, slots_B1, column_B1)
        self.valid_BS = self.valid_BS.scatter(1, slots_B1, keep_B[:, None])
        self.length_B = self.length_B + keep_B
        self.even = False

    def select_rows(self, index: Tensor) -> None:
        """Take rows by index, for beam search."""
        self.length_B, self.valid_BS = self.length_B[index], self.valid_BS[index]
        self.column_BS = self.column_BS[index]

    def _close(self) -> Tensor:
        if self.slots_BQ is None:
            raise ValueError(
                "the cache was used outside of a pass of the model that its sparsifier is attached to"
            )
        slots_BQ, self.slots_BQ = self.slots_BQ, None
        return slots_BQ

    def _make_room(self, queries: int) -> None:
        if self.used + queries > self.capacity and not self.even:
            self.used = int(self.length_B.max())
        if self.limit is not None and self.used + queries > self.limit:
            raise ValueError(
                f"the cache is full: it has room for {self.limit} tokens a row, {self.used} are there and "
                f"{queries} were to come; give it a greater capacity"
            )
        self.used += queries
        if self.used > self.capacity:
            blocks = -(-self.used // BLOCK)
            more = (0, blocks * BLOCK - self.capacity)
            self.valid_BS = torch.nn.functional.pad(self.valid_BS, more)
            self.column_BS = torch.nn.functional.pad(self.column_BS, more)


class SparseLayer(CacheLayerMixin):
    """Keys and values of one layer, ``[B, H, S, D]``, laid out by its stage."""

    keys: Any
    values: Any

    def __init__(self, stage: Stage) -> None:
        super().__init__()
        self.stage = stage

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Allocate the storage on the first pass."""
        self.keys, self.values = self._grown(None, key_states), self._grown(None, value_states)
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Write new keys and values ``[B, H, Q, D]`` at the stage's slots; return those of all used slots."""
        slots_BQ = self.stage.slots_BQ
        if slots_BQ is None:
            raise ValueError(
                "the cache was used outside of a pass of the model that its sparsifier is attached to"
            )
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        elif self.keys.shape[2] < self.stage.capacity:
            self.keys, self.values = (
                self._grown(self.keys, key_states),
                self._grown(self.values, value_states),
            )
        return self._write(self.keys, key_states, slots_BQ), self._write(self.values, value_states, slots_BQ)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return length and offset of the keys that ``update`` would return."""
        return self.get_seq_length() + query_length, 0

    def get_seq_length(self) -> int:
        """Return the longest row's number of slots, padding included."""
        return int(self.stage.length_B.max()) if self.stage.length_B.numel() else 0

    def get_max_length(self) -> int:
        """Return how many tokens a row there is room for; -1 if the storage grows."""
        return -1 if self.stage.limit is None else self.stage.limit

    get_max_cache_shape = get_max_length  # its name in older versions of transformers 5

    def reset(self) -> None:
        """Free the storage."""
        self.keys = self.values = None
        self.is_initialized = False

    def select_rows(self, index: Tensor) -> None:
        """Take rows by index, for beam search."""
        if self.is_initialized:
            with torch.inference_mode(False):  # as for growing
                self.keys, self.values = self.keys[index], self.values[index]

    def _grown(self, old_BHSD: Tensor | None, new_BHQD: Tensor) -> Tensor:
        batch, heads, _, head_dim = new_BHQD.shape
        with torch.inference_mode(False):  # a cache filled in inference mode may be continued outside of it
            grown = new_BHQD.new_zeros(batch, heads, self.stage.capacity, head_dim)
        if old_BHSD is not None:
            grown[:, :, : old_BHSD.shape[2]] = old_BHSD
        return grown

    def _write(self, storage_BHSD: Tensor, new_BHQD: Tensor, slots_BQ: Tensor) -> Tensor:
        stage, queries = self.stage, new_BHQD.shape[2]
        if stage.even:
            storage_BHSD[:, :, stage.used - queries : stage.used] = new_BHQD
        else:
            slots_BQ = slots_BQ.to(new_BHQD.device)  # a device_map may part the layers of a stage
            rows_B1 = torch.arange(new_BHQD.shape[0], device=new_BHQD.device)[:, None]
            storage_BHSD[rows_B1, :, slots_BQ] = new_BHQD.transpose(1, 2)
        return storage_BHSD[:, :, : stage.used]


class SparseCache(Cache):
    """The K/V cache of an attached model; ``generate()`` carries it like any other.

    Parameters
    ----------
    num_layers
        Layers of the decoder.
    split
        Layer l: the layers below share the dense stage, the others the sparse one.
    report
        The record of all calls that use this cache.
    capacity
        Tokens a row that it has room for, allocated at the first call; None lets it grow.
    """

    def __init__(self, num_layers: int, split: int, report: Report, capacity: int | None = None) -> None:
        self.dense, self.sparse = Stage(capacity), Stage(capacity)
        self.split = split
        self.answered = 0  # output tokens fed back since the last prompt
        self.report = report
        report.stages = (self.dense, self.sparse)
        self.layers: Any  # every one a SparseLayer
        super().__init__(
            layers=[SparseLayer(self.dense if i < split else self.sparse) for i in range(num_layers)]
        )

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Return how many tokens were fed, padding included (layer 0 holds them all)."""
        return self.dense.used if layer_idx < self.split else super().get_seq_length(layer_idx)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Reorder the rows for beam search."""
        self._select_rows(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row ``repeats`` times."""
        rows_B = torch.arange(self.dense.length_B.shape[0], device=self.dense.length_B.device)
        self._select_rows(rows_B.repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the rows ``indices``."""
        self._select_rows(indices)

    def reset(self) -> None:
        """Forget all tokens and begin a new report."""
        for part in (self.dense, self.sparse, *self.layers):
            part.reset()
        self.answered = 0
        self.report = self.report.fresh()

    def crop(self, tokens_to_remove: int) -> NoReturn:
        """Refuse: a dropped token cannot be given back, so assisted decoding cannot roll back."""
        raise ValueError(
            "a sparse cache cannot be cropped: assisted and speculative decoding need a dense model"
        )

    def _select_rows(self, index: Tensor) -> None:
        for part in (self.dense, self.sparse, *self.layers):
            part.select_rows(index)
        self.report.select_rows(index)
