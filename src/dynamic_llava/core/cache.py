"""A K/V cache with two row lengths and an overwritten slot.

All layers < l share one :class:`~dynamic_llava.core.slots.Stage`, all layers >= l another. No concatenation,
no loop over rows.

Legend: B batch, Q new tokens, S slots, H heads, D head size.
"""

from __future__ import annotations

import math
from typing import Any, NoReturn, cast

import torch
from torch import Tensor
from transformers import Cache
from transformers.cache_utils import CacheLayerMixin

from dynamic_llava.core.report import Report
from dynamic_llava.core.slots import Stage, StaticStage, keep_address
from dynamic_llava.methods import EvictingPolicy, Held


class SparseLayer(CacheLayerMixin):
    """Keys and values of one layer, ``[B, H, S, D]``, laid out by its stage."""

    keys: Any
    values: Any

    def __init__(self, stage: Stage) -> None:
        super().__init__()
        self.stage = stage

    @property
    def is_compileable(self) -> bool:  # type: ignore[override]
        """Whether ``generate`` may compile the steps that use it."""
        return self.stage.is_static

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Allocate the storage on the first pass."""
        self.keys, self.values = self._grown(None, key_states), self._grown(None, value_states)
        if self.stage.is_static:
            keep_address(self.keys, self.values)
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
        elif self.keys.shape[2] < self.stage.capacity:  # one after the other: never two copies of both
            self.keys = self._grown(self.keys, key_states)
            self.values = self._grown(self.values, value_states)
        return self._write(self.keys, key_states, slots_BQ), self._write(self.values, value_states, slots_BQ)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return length and offset of the keys that ``update`` would return."""
        held = self.get_max_length() if self.stage.is_static else int(self.get_seq_length()) + query_length
        return held, 0

    def get_seq_length(self) -> Any:
        """Return the longest row's number of slots, padding included: a tensor if static, not to wait for."""
        if not self.stage.length_B.numel():
            return 0
        longest = self.stage.length_B.max()
        return longest if self.stage.is_static else int(longest)

    def get_max_length(self) -> int:
        """Return how many tokens a row there is room for; -1 if the storage grows."""
        return -1 if self.stage.limit is None else self.stage.limit

    get_max_cache_shape = get_max_length  # its name in older versions of transformers 5

    def reset(self) -> None:
        """Free the storage."""
        self.keys = self.values = None
        self.is_initialized = False

    def move(self, from_B1: Tensor, to_B1: Tensor) -> None:
        """Copy what lies in one slot of each row into another."""
        rows_B = torch.arange(self.keys.shape[0], device=self.keys.device)
        start_B, end_B = (slots_B1[:, 0].to(self.keys.device) for slots_B1 in (from_B1, to_B1))
        for storage_BHSD in (self.keys, self.values):
            storage_BHSD[rows_B, :, end_B] = storage_BHSD[rows_B, :, start_B]

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
        if stage.contiguous:
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
        Tokens a row that it has room for; None lets it grow in blocks. The dense stage has that room from the
        start, the sparse one what is expected to stay, and grows in small steps where more does.
    static
        Whether storage has its final size from the first pass on, so that decoding compiles; needs a
        ``capacity``. The sparse stage then has room for all that was not dropped in the first pass.
    """

    def __init__(
        self, num_layers: int, split: int, report: Report, capacity: int | None = None, static: bool = False
    ) -> None:
        self.capacity, self.split, self.report = capacity, split, report
        self._stage_type = StaticStage if static else Stage
        self.mass_BS: Tensor  # attention received in each slot, for policies that evict
        self.answer_start: Tensor  # column of a turn's first output token
        self._begin()
        self.layers: Any  # every one a SparseLayer
        super().__init__(
            layers=[SparseLayer(self.dense if i < split else self.sparse) for i in range(num_layers)]
        )

    def plan(self, entering: int, keep_rate: float) -> None:
        """Size the sparse stage before its first pass, of ``entering`` tokens a row.

        ``keep_rate`` is the expected share of later tokens that stay.
        """
        if self.capacity is None:
            return
        later = self.capacity - self.dense.used
        self.sparse.limit = entering + later
        if self.sparse.is_static:
            self.sparse.reserve = self.sparse.limit
        else:  # beside the kept ones, the newest token needs a slot
            self.sparse.reserve = min(self.sparse.limit, entering + math.ceil(later * keep_rate) + 1)

    def begin_answer(self) -> None:
        """Remember where the output tokens of a turn begin, once its prompt is in the dense stage."""
        end = self.dense.length_B[:1]
        if not self.answer_start.numel():
            with torch.inference_mode(False):
                self.answer_start = torch.zeros_like(end)
            if self.dense.is_static:
                keep_address(self.answer_start)
        self.answer_start.copy_(end)

    def evict(self, policy: EvictingPolicy, weights_BS: Tensor, column_B1: Tensor) -> None:
        """End a decoding step under a policy that may give up an earlier token, whose slot the new one takes.

        Parameters
        ----------
        weights_BS
            Attention that the new token paid to each used slot.
        column_B1
            Where the new token stood in what was fed.
        """
        sparse = self.sparse
        slots_B1 = cast(Tensor, sparse.slots_BQ)
        more = weights_BS.shape[1] - self.mass_BS.shape[1]
        if self.mass_BS.shape[0] != len(weights_BS):
            self.mass_BS = torch.zeros_like(weights_BS)
        elif more > 0:
            self.mass_BS = torch.nn.functional.pad(self.mass_BS, (0, more))
        # The slot was another token's before, or never used: what it received does not count.
        mass_BS = self.mass_BS[:, : weights_BS.shape[1]].scatter(1, slots_B1, 0.0) + weights_BS
        self.mass_BS[:, : weights_BS.shape[1]] = mass_BS
        column_BS = sparse.column_BS[:, : sparse.used].scatter(1, slots_B1, column_B1)
        is_held_BS = sparse.valid_BS[:, : sparse.used].scatter(1, slots_B1, True)
        ordinal_BS = column_BS - self.answer_start
        victim_B = policy.evict(Held(ordinal_BS, is_held_BS & (ordinal_BS >= 0), mass_BS))
        target_B1 = torch.where(victim_B < 0, slots_B1[:, 0], victim_B)[:, None]
        for layer in self.layers[self.split :]:
            layer.move(slots_B1, target_B1)
        self.mass_BS.scatter_(1, target_B1, mass_BS.gather(1, slots_B1))
        sparse.keep(victim_B < 0, column_B1)
        sparse.place(target_B1, column_B1, victim_B != slots_B1[:, 0])

    def get_seq_length(self, layer_idx: int = 0) -> Any:
        """Return how many tokens were fed, padding included (layer 0 holds them all)."""
        is_known = layer_idx < self.split and not self.dense.is_static
        return self.dense.used if is_known else super().get_seq_length(layer_idx)

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
        """Forget all tokens and begin a new report; the old one stays as it is."""
        self.report = self.report.fresh()
        self._begin()
        for number, layer in enumerate(self.layers):
            layer.reset()
            layer.stage = self.dense if number < self.split else self.sparse

    def crop(self, tokens_to_remove: int) -> NoReturn:
        """Refuse: a dropped token cannot be given back, so assisted decoding cannot roll back."""
        raise ValueError(
            "a sparse cache cannot be cropped: assisted and speculative decoding need a dense model"
        )

    def _begin(self) -> None:
        self.dense, self.sparse = self._stage_type(self.capacity), self._stage_type(self.capacity)
        self.answer_start = torch.zeros(0, dtype=torch.long)
        self.mass_BS = torch.zeros(0, 0)
        self.report.stages = (self.dense, self.sparse)

    def _select_rows(self, index: Tensor) -> None:
        for part in (self.dense, self.sparse, *self.layers):
            part.select_rows(index)
        if self.mass_BS.numel():
            self.mass_BS = self.mass_BS[index.to(self.mass_BS.device)]
        self.report.select_rows(index)
