"""The K/V cache of an attached model: a stock ``Cache`` whose layers >= l are sparse.

The sparse layers share a :class:`Context`. The layers below l stay stock, but for growing ones, which get
storage with room in place of a concatenation at every token.

Legend: B batch, Q new tokens, S slots, H heads, D head size.
"""

from __future__ import annotations

import math
from typing import Any, NoReturn, cast

import torch
from torch import Tensor
from transformers import Cache
from transformers.cache_utils import (
    CacheLayerMixin,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    StaticLayer,
    StaticSlidingWindowLayer,
)

from dynamic_llava.core.report import Report
from dynamic_llava.core.slots import Slots, StaticSlots, check_room, keep_address, size_for
from dynamic_llava.methods import EvictingPolicy, Held

STOCK_LAYERS = (DynamicLayer, DynamicSlidingWindowLayer, StaticLayer, StaticSlidingWindowLayer)


class GrowingLayer(DynamicLayer):
    """Keys and values ``[B, H, S, D]`` of a dense layer, in storage with room for more.

    Parameters
    ----------
    capacity
        Tokens a row that it has room for from the start; None lets it grow in blocks.
    """

    keys: Any
    values: Any

    def __init__(self, capacity: int | None = None) -> None:
        super().__init__()
        self.capacity = capacity
        self.used = 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Note where the keys lie; storage comes with the first ones."""
        self.device, self.is_initialized = key_states.device, True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Write new keys and values ``[B, H, Q, D]``; return all."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        start, self.used = self.used, self.used + key_states.shape[2]
        check_room(self.used, self.capacity)
        room = size_for(self.used, self.capacity or 0, self.capacity)
        # One after the other: there are never two copies of both.
        self.keys = _with_room(self.keys, key_states, room)
        self.values = _with_room(self.values, value_states, room)
        self.keys[:, :, start : self.used] = key_states
        self.values[:, :, start : self.used] = value_states
        return self.keys[:, :, : self.used], self.values[:, :, : self.used]

    def get_seq_length(self) -> int:
        """Return how many tokens were fed, padding included."""
        return self.used

    def get_max_length(self) -> int:
        """Return how many tokens a row there is room for; -1 if the storage grows."""
        return -1 if self.capacity is None else self.capacity

    get_max_cache_shape = get_max_length  # its name in older versions of transformers 5

    def reset(self) -> None:
        """Free the storage."""
        super().reset()
        self.used = 0

    def crop(self, tokens_to_remove: int) -> NoReturn:
        """Refuse, before any layer is cropped."""
        refuse_cropping()

    def reorder_cache(self, beam_idx: Any) -> None:
        """Take rows by index, for beam search."""
        with torch.inference_mode(False):  # as for growing
            super().reorder_cache(beam_idx)


class SparseLayer(CacheLayerMixin):
    """Keys and values ``[B, H, S, D]`` of a sparse layer, at the slots that its context says.

    To the stock code it has all columns that were fed, for the masks that it makes are gathered afterwards.

    Parameters
    ----------
    context
        What all sparse layers of a cache share.
    is_sliding
        Whether the stock layer has a sliding window.
    """

    keys: Any
    values: Any

    def __init__(self, context: Context, is_sliding: bool) -> None:
        super().__init__()
        self.context, self.is_sliding = context, is_sliding

    @property
    def is_compileable(self) -> bool:  # type: ignore[override]
        """Whether ``generate`` may compile the steps that use it."""
        return self.context.slots.is_static

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Allocate the storage on the first pass."""
        room = self.context.slots.capacity
        self.keys, self.values = (_with_room(None, new, room) for new in (key_states, value_states))
        if self.context.slots.is_static:
            keep_address(self.keys, self.values)
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Write new keys and values ``[B, H, Q, D]`` at their slots; return those of all used slots."""
        slots = self.context.slots
        if slots.slots_BQ is None:
            raise ValueError(
                "the cache was used outside of a pass of the model that its sparsifier is attached to"
            )
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        elif self.keys.shape[2] < slots.capacity:
            self.keys = _with_room(self.keys, key_states, slots.capacity)
            self.values = _with_room(self.values, value_states, slots.capacity)
        return self._write(self.keys, key_states), self._write(self.values, value_states)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return length and offset of the columns that a stock mask must have."""
        slots = self.context.slots
        return (self.get_max_length() if slots.is_static else slots.fed + query_length), 0

    def get_seq_length(self) -> Any:
        """Return how many columns were fed: a tensor if static, not to wait for."""
        return self.context.slots.fed

    def get_max_length(self) -> int:
        """Return how many columns there is room for; -1 if the storage grows."""
        return -1 if self.context.capacity is None else self.context.capacity

    get_max_cache_shape = get_max_length  # its name in older versions of transformers 5

    def reset(self) -> None:
        """Free the storage; the first layer also begins a new context."""
        self.keys = self.values = None
        self.is_initialized = False
        if self is self.context.layers[0]:
            self.context.reset()

    def crop(self, tokens_to_remove: int) -> NoReturn:
        """Refuse: a dropped token cannot be given back, so assisted decoding cannot roll back."""
        refuse_cropping()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Take rows by index, for beam search; the first layer also takes those of the context."""
        if self.is_initialized:
            with torch.inference_mode(False):  # as for growing
                self.keys, self.values = self.keys[beam_idx], self.values[beam_idx]
        if self is self.context.layers[0]:
            self.context.select_rows(beam_idx)

    batch_select_indices = reorder_cache

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row ``repeats`` times."""
        self.reorder_cache(torch.arange(len(self.keys), device=self.keys.device).repeat_interleave(repeats))

    def pack(self, from_BS: Tensor) -> None:
        """Move what lies at ``from_BS`` to the first slots."""
        from_BS = from_BS.to(self.keys.device)
        for storage_BHSD in (self.keys, self.values):
            _, heads, _, size = storage_BHSD.shape
            index_BHSD = from_BS[:, None, :, None].expand(-1, heads, -1, size)
            storage_BHSD[:, :, : from_BS.shape[1]] = storage_BHSD.gather(2, index_BHSD)

    def move(self, from_B1: Tensor, to_B1: Tensor) -> None:
        """Copy what lies in one slot of each row into another."""
        rows_B = torch.arange(self.keys.shape[0], device=self.keys.device)
        start_B, end_B = (slots_B1[:, 0].to(self.keys.device) for slots_B1 in (from_B1, to_B1))
        for storage_BHSD in (self.keys, self.values):
            storage_BHSD[rows_B, :, end_B] = storage_BHSD[rows_B, :, start_B]

    def _write(self, storage_BHSD: Tensor, new_BHQD: Tensor) -> Tensor:
        slots, queries = self.context.slots, new_BHQD.shape[2]
        if slots.contiguous:
            storage_BHSD[:, :, slots.used - queries : slots.used] = new_BHQD
        else:
            slots_BQ = cast(Tensor, slots.slots_BQ).to(new_BHQD.device)  # a device_map may part the layers
            rows_B1 = torch.arange(new_BHQD.shape[0], device=new_BHQD.device)[:, None]
            storage_BHSD[rows_B1, :, slots_BQ] = new_BHQD.transpose(1, 2)
        return storage_BHSD[:, :, : slots.used]


class Context:
    """What the sparse layers of a cache share.

    Parameters
    ----------
    report
        The record of all calls that use the cache.
    capacity
        Tokens a row that the cache has room for; None lets it grow.
    static
        Whether storage has its final size from the first pass on, so that decoding compiles.

    Attributes
    ----------
    slots
        Which token each slot holds.
    layers
        The sparse layers.
    is_busy
        Whether a call is under way, or failed halfway.
    answer_start
        Column of a turn's first output token, int64 ``[1]``.
    """

    def __init__(self, report: Report, capacity: int | None, static: bool) -> None:
        self.capacity, self.report = capacity, report
        self.layers: list[SparseLayer] = []
        self.slots: Slots
        self.is_busy: bool
        self.answer_start: Tensor
        self.mass_BS: Tensor  # attention received in each slot, for policies that evict
        self._new_slots = StaticSlots if static else Slots
        self._begin()

    def begin(self, batch: int) -> None:
        """Begin a call of ``batch`` rows, before any layer writes."""
        if self.is_busy:
            raise ValueError("an earlier call with this cache failed halfway: reset it or begin a new one")
        if self.slots.used and batch != (rows := len(self.slots.length_B)):
            raise ValueError(f"past_key_values holds {rows} rows, the call has {batch}: they must agree")
        self.is_busy = True

    def plan(self, entering: int, fed: int, keep_rate: float) -> None:
        """Size the slots before the first pass, of ``fed`` columns and ``entering`` tokens a row.

        ``keep_rate`` is the expected share of later tokens that stay.
        """
        if self.capacity is None:
            return
        later = self.capacity - fed
        slots = self.slots
        slots.limit = entering + later
        if slots.is_static:
            slots.reserve = slots.limit
        else:  # beside the kept ones, the newest token needs a slot
            slots.reserve = min(slots.limit, entering + math.ceil(later * keep_rate) + 1)

    def begin_answer(self, column: int, device: torch.device) -> None:
        """Remember where the output tokens of a turn begin."""
        if not self.answer_start.numel():
            with torch.inference_mode(False):
                self.answer_start = torch.zeros(1, dtype=torch.long, device=device)
            if self.slots.is_static:
                keep_address(self.answer_start)
        self.answer_start.fill_(column)

    def pack(self) -> None:
        """Make rows even again before more than one token comes."""
        from_BS = self.slots.pack()
        for layer in self.layers:
            layer.pack(from_BS)

    def evict(self, policy: EvictingPolicy, weights_BS: Tensor, column_B1: Tensor) -> None:
        """End a decoding step under a policy that may give up an earlier token, whose slot the new one takes.

        Parameters
        ----------
        weights_BS
            Attention that the new token paid to each used slot.
        column_B1
            Where the new token stood in what was fed.
        """
        slots = self.slots
        slots_B1 = cast(Tensor, slots.slots_BQ)
        more = weights_BS.shape[1] - self.mass_BS.shape[1]
        if self.mass_BS.shape[0] != len(weights_BS):
            self.mass_BS = torch.zeros_like(weights_BS)
        elif more > 0:
            self.mass_BS = torch.nn.functional.pad(self.mass_BS, (0, more))
        # The slot was another token's before, or never used: what it received does not count.
        mass_BS = self.mass_BS[:, : weights_BS.shape[1]].scatter(1, slots_B1, 0.0) + weights_BS
        self.mass_BS[:, : weights_BS.shape[1]] = mass_BS
        column_BS, is_held_BS = slots.seen(None)
        ordinal_BS = column_BS - self.answer_start
        victim_B = policy.evict(Held(ordinal_BS, is_held_BS & (ordinal_BS >= 0), mass_BS))
        target_B1 = torch.where(victim_B < 0, slots_B1[:, 0], victim_B)[:, None]
        for layer in self.layers:
            layer.move(slots_B1, target_B1)
        self.mass_BS.scatter_(1, target_B1, mass_BS.gather(1, slots_B1))
        slots.keep(victim_B < 0)
        slots.place(target_B1, column_B1, victim_B != slots_B1[:, 0])

    def reset(self) -> None:
        """Forget all tokens and begin a new report; the old one stays as it is."""
        self.report = self.report.fresh()
        self._begin()

    def select_rows(self, index: Tensor) -> None:
        """Take rows by index, for beam search."""
        self.slots.select_rows(index)
        if self.mass_BS.numel():
            self.mass_BS = self.mass_BS[index.to(self.mass_BS.device)]
        self.report.select_rows(index)

    def _begin(self) -> None:
        self.is_busy = False
        self.slots = self._new_slots(self.capacity)
        self.answer_start = torch.zeros(0, dtype=torch.long)
        self.mass_BS = torch.zeros(0, 0)
        self.report.slots = self.slots


def context_of(cache: Any) -> Context | None:
    """Return what the sparse layers of a cache share; None where it has none."""
    layers = getattr(cache, "layers", ())
    return layers[-1].context if layers and isinstance(layers[-1], SparseLayer) else None


def install(cache: Cache, layers: int, split: int, report: Report) -> Context:
    """Put sparse layers in place of an empty cache's layers from ``split`` on, and return what they share.

    Raises
    ------
    ValueError
        If the cache is not empty, or of a kind that its layers cannot be exchanged in.
    """
    stock: list[Any] = list(cache.layers)
    is_stock = all(type(layer) in STOCK_LAYERS for layer in stock) and not cache.offloading
    if not is_stock or any(layer.is_initialized for layer in stock):
        raise ValueError(
            f"past_key_values is a {type(cache).__name__}: an attached model takes None, an empty "
            "DynamicCache or StaticCache, sparsifier.new_cache(), or the cache that it returned itself (none "
            "that is quantized, offloaded or filled)"
        )
    static = bool(stock) and cache.is_compileable
    capacity = max(layer.max_cache_len for layer in stock) if static else None
    return fill(cache, layers, split, report, capacity, static)


def fill(
    cache: Cache, layers: int, split: int, report: Report, capacity: int | None, static: bool
) -> Context:
    """Give an empty cache its layers: below ``split`` its own, or growing ones; sparse ones from there on."""
    context = Context(report, capacity, static)
    stock: list[Any] = list(cache.layers) or [DynamicLayer() for _ in range(layers)]
    dense = [GrowingLayer(capacity) if type(layer) is DynamicLayer else layer for layer in stock[:split]]
    context.layers = [SparseLayer(context, bool(layer.is_sliding)) for layer in stock[split:layers]]
    cache.layers = [*dense, *context.layers]
    return context


def check_same(cache: Cache, layers: int, split: int) -> None:
    """Raise ``ValueError`` if a cache was filled with another layer l or by another decoder."""
    first = next(number for number, layer in enumerate(cache.layers) if isinstance(layer, SparseLayer))
    if (len(cache.layers), first) != (layers, split):
        raise ValueError(
            f"past_key_values was filled with {len(cache.layers)} layers, sparse from {first}; the model "
            f"has {layers}, sparse from {split}"
        )


def refuse_cropping() -> NoReturn:
    """Say that assisted decoding cannot roll a sparse cache back."""
    raise ValueError("a sparse cache cannot be cropped: assisted and speculative decoding need a dense model")


def _with_room(old_BHSD: Tensor | None, new_BHQD: Tensor, slots: int) -> Tensor:
    """Return storage of at least ``slots`` slots: the old one, or a larger one with what that holds."""
    held = 0 if old_BHSD is None else old_BHSD.shape[2]
    if old_BHSD is not None and held >= slots:
        return old_BHSD
    batch, heads, _, size = new_BHQD.shape
    with torch.inference_mode(False):  # a cache filled in inference mode may be continued outside of it
        grown = new_BHQD.new_zeros(batch, heads, slots, size)
    if old_BHSD is not None:
        grown[:, :, :held] = old_BHSD
    return grown
