"""The K/V cache of an attached model: a stock ``Cache`` whose layers >= l are sparse.

The sparse layers share a :class:`Context`. The layers below l stay stock, but for growing ones, which get
storage with room in place of a concatenation at every token.

Legend: B batch, Q new tokens, S slots, H heads, D head size.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor
from transformers import Cache
from transformers.cache_utils import (
    DynamicCache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    StaticLayer,
    StaticSlidingWindowLayer,
)

from dynamic_llava.core.record import Record
from dynamic_llava.core.slots import Slots, check_room, size_for
from dynamic_llava.core.static import StaticSlots, keep_address
from dynamic_llava.costs.shape import DecoderShape

STOCK_LAYERS = (DynamicLayer, DynamicSlidingWindowLayer, StaticLayer, StaticSlidingWindowLayer)


class RoomyLayer(DynamicLayer):
    """Keys and values ``[B, H, S, D]`` in storage with room for more than what is held.

    Parameters
    ----------
    capacity
        Tokens a row that may be fed; None for no limit.
    """

    is_croppable = False
    keys: Any
    values: Any

    def __init__(self, capacity: int | None) -> None:
        super().__init__()
        self.capacity = capacity

    def get_max_length(self) -> int:
        """Return how many tokens a row there is room for; -1 if the storage grows."""
        return -1 if self.capacity is None else self.capacity

    get_max_cache_shape = get_max_length  # its name in older versions of transformers 5

    def make_room(self, keys_BHQD: Tensor, values_BHQD: Tensor, slots: int) -> None:
        """Have storage of at least ``slots`` slots for keys and values such as these."""
        if not self.is_initialized or self.keys.shape[2] < slots:
            # One after the other: there are never two copies of both.
            self.keys = _with_room(self.keys, keys_BHQD, slots)
            self.values = _with_room(self.values, values_BHQD, slots)
            self.device, self.is_initialized = keys_BHQD.device, True

    def crop(self, tokens_to_remove: int) -> NoReturn:
        """Refuse: a dropped token cannot be given back, so assisted decoding cannot roll back."""
        raise ValueError(
            "a sparse cache cannot be cropped: assisted and speculative decoding need a dense model"
        )

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Take rows by index, for beam search."""
        if self.is_initialized:
            with torch.inference_mode(False):  # as for growing
                self.keys, self.values = self.keys[beam_idx], self.values[beam_idx]

    def batch_select_indices(self, indices: Tensor) -> None:
        """Take rows by index."""
        self.reorder_cache(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row ``repeats`` times."""
        self.reorder_cache(torch.arange(len(self.keys), device=self.keys.device).repeat_interleave(repeats))


class GrowingLayer(RoomyLayer):
    """A dense layer: all that was fed is held."""

    used = 0

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Write new keys and values ``[B, H, Q, D]``; return all."""
        start, self.used = self.used, self.used + key_states.shape[2]
        if not self.is_initialized or self.used > self.keys.shape[2]:
            check_room(self.used, self.capacity)
            self.make_room(key_states, value_states, size_for(self.used, self.capacity or 0, self.capacity))
        self.keys[:, :, start : self.used] = key_states
        self.values[:, :, start : self.used] = value_states
        return self.keys[:, :, : self.used], self.values[:, :, : self.used]

    def get_seq_length(self) -> int:
        """Return how many tokens were fed, padding included."""
        return self.used

    def reset(self) -> None:
        """Free the storage."""
        super().reset()
        self.used = 0


class SparseLayer(RoomyLayer):
    """A sparse layer: keys and values lie at the slots that its context says.

    To the stock code it has all columns that were fed, for the masks that it makes are gathered afterwards.

    Parameters
    ----------
    context
        What all sparse layers of a cache share.
    is_sliding
        Whether the stock layer has a sliding window.
    """

    def __init__(self, context: Context, is_sliding: bool) -> None:
        super().__init__(context.capacity)
        self.context, self.is_sliding = context, is_sliding

    @property
    def is_compileable(self) -> bool:  # type: ignore[override]
        """Whether ``generate`` may compile the steps that use it."""
        return self.context.slots.is_static

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Write new keys and values ``[B, H, Q, D]`` at their slots; return those of all used slots."""
        slots, is_new = self.context.slots, not self.is_initialized
        if slots.slots_BQ is None:
            raise ValueError(
                "the cache was used outside of a pass of the model that its sparsifier is attached to"
            )
        self.make_room(key_states, value_states, slots.capacity)
        if is_new and slots.is_static:
            keep_address(self.keys, self.values)
        _, heads, queries, _ = key_states.shape
        if slots.contiguous:
            new = slice(slots.used - queries, slots.used)
            self.keys[:, :, new], self.values[:, :, new] = key_states, value_states
        else:
            places = slots.places(heads).to(key_states.device)  # a device_map may part the layers
            self.keys.flatten(0, 2).index_copy_(0, places, key_states.flatten(0, 2))
            self.values.flatten(0, 2).index_copy_(0, places, value_states.flatten(0, 2))
        return self.keys[:, :, : slots.used], self.values[:, :, : slots.used]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return length and offset of the columns that a stock mask must have."""
        slots = self.context.slots
        return (self.get_max_length() if slots.is_static else slots.fed + query_length), 0

    def get_seq_length(self) -> Any:
        """Return how many columns were fed: a tensor if static, not to wait for."""
        return self.context.slots.fed

    def reset(self) -> None:
        """Free the storage; the first layer also begins a new context."""
        super().reset()
        if self is self.context.layers[0]:
            self.context.reset()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Take rows by index; the first layer also takes those of the context."""
        super().reorder_cache(beam_idx)
        if self is self.context.layers[0]:
            self.context.select_rows(beam_idx)


class Context:
    """What the sparse layers of a cache share.

    Parameters
    ----------
    record
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
    image_positions
        Where the pictures of a first prompt lie that comes as embeddings, by row; None where ids tell.
    is_busy
        Whether a call is under way, or failed halfway.
    """

    def __init__(self, record: Record, capacity: int | None, static: bool) -> None:
        self.capacity, self.record = capacity, record
        self.layers: list[SparseLayer] = []
        self.image_positions: Sequence[Sequence[Tensor]] | None = None
        self.slots: Slots
        self.is_busy: bool
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

    def lacks_columns(self, mask: Any) -> bool:
        """Tell whether a call that goes on may have to remember columns that its mask leaves out."""
        if mask is None:
            return bool(self.slots.padding)
        return self.slots.used > 0 and not self.slots.is_static and getattr(mask, "ndim", 0) == 2

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

    def reset(self) -> None:
        """Forget all tokens and begin a new report; the old one stays as it is."""
        self.record = self.record.fresh()
        self._begin()

    def select_rows(self, index: Tensor) -> None:
        """Take rows by index, for beam search."""
        self.slots.select_rows(index)
        if self.mass_BS.numel():
            self.mass_BS = self.mass_BS[index.to(self.mass_BS.device)]
        self.record.select_rows(index)

    def _begin(self) -> None:
        self.is_busy = False
        self.slots = self._new_slots(self.capacity)
        self.mass_BS = torch.zeros(0, 0)
        self.record.slots = self.slots


def context_of(cache: Any) -> Context | None:
    """Return what the sparse layers of a cache share; None where it has none."""
    layers = getattr(cache, "layers", ())
    return layers[-1].context if layers and isinstance(layers[-1], SparseLayer) else None


def install(cache: Cache, layers: int, split: int, record: Record, window: int | None) -> Context:
    """Put sparse layers in place of an empty cache's layers from ``split`` on, and return what they share.

    ``window`` is the decoder's sliding window, which cuts the layers of a static cache short.

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
    if static and capacity == window and all(layer.is_sliding for layer in stock):
        raise ValueError(
            "every layer of the static cache ends at its sliding window, so that nothing tells its capacity: "
            "give past_key_values=sparsifier.new_cache(capacity, static=True)"
        )
    return fill(cache, layers, split, record, capacity, static)


def growing(config: Any, shape: DecoderShape) -> DynamicCache:
    """Return an empty cache for a decoder; it asks the config, which takes long, only where layers differ."""
    return DynamicCache(config=config) if shape.windows else DynamicCache()


def fill(
    cache: Cache, layers: int, split: int, record: Record, capacity: int | None, static: bool
) -> Context:
    """Give an empty cache its layers: below ``split`` its own, or growing ones; sparse ones from there on."""
    context = Context(record, capacity, static)
    stock: list[Any] = list(cache.layers) or [DynamicLayer() for _ in range(layers)]
    dense = [GrowingLayer(capacity) if type(layer) is DynamicLayer else layer for layer in stock[:split]]
    context.layers = [SparseLayer(context, bool(layer.is_sliding)) for layer in stock[split:layers]]
    cache.layers = [*dense, *context.layers]
    return context


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
