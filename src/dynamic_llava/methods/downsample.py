"""Fewer pixels instead of fewer tokens: the baseline that every method of dropping image tokens must beat."""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import BatchFeature, PreTrainedModel, ProcessorMixin
from transformers.image_utils import make_flat_list_of_images

from dynamic_llava.methods.top_k import keep_count

INTERPOLATE = "interpolate_pos_encoding"
"""An argument of towers that interpolate when asked; a method of those that always do."""


@contextmanager
def downsampled(model: PreTrainedModel, processor: ProcessorMixin, rate: float) -> Iterator[ProcessorMixin]:
    """Let a model look at smaller pictures for the length of a block.

    Where the processor limits the pixels of a picture (``max_pixels``), as that of Qwen-VL, each picture gets
    the limit that leaves it ``rate`` of its tokens at most. Elsewhere the pictures shrink to a grid of
    :func:`grid_side` patches a side, and the tower interpolates its position embeddings, as transformers does
    for other sizes. Nothing else changes: use it on a stock model, or within
    :func:`dynamic_llava.chat.asking.dense`.

    Parameters
    ----------
    model
        With a vision tower that can interpolate its position embeddings, such as CLIP's or DINOv2's, or takes
        pictures of any size, as Qwen-VL's.
    processor
        The model's; stays as it is.
    rate
        Share of image tokens, in (0, 1].

    Yields
    ------
    ProcessorMixin
        What to encode questions with inside the block.

    Raises
    ------
    ValueError
        If the rate is out of range, or the tower or processor cannot do it.
    """
    if not 0 < rate <= 1:
        raise ValueError(f"rate is {rate}: a keep rate must be greater than 0 and at most 1")
    if _limits_pixels(processor.image_processor):
        made = copy.copy(processor)
        made.image_processor = Limited(processor.image_processor, rate)
        yield made
        return
    tower: Any = getattr(model.model, "vision_tower", None)
    if tower is None or not _interpolates(tower):
        raise ValueError(
            f"{type(model).__name__} has no vision tower that takes pictures of other sizes: CLIP's does"
        )
    smaller = _smaller(processor, rate)
    with _asked_to_interpolate(tower):
        yield smaller


class Limited:
    """An image processor that gives each picture a share of the tokens that it would have, by its own limit.

    Parameters
    ----------
    inner
        Has ``max_pixels``, and makes a token of every ``merge_size`` x ``merge_size`` patches.
    rate
        Share of the tokens.
    """

    def __init__(self, inner: Any, rate: float) -> None:
        self.inner = inner
        self.rate = rate

    def __getattr__(self, name: str) -> Any:
        """Return what the image processor has."""
        return getattr(self.__dict__["inner"], name)

    def __call__(self, images: Any, return_tensors: Any = None, **options: Any) -> BatchFeature:
        """Process pictures, each by itself."""
        pictures: Any = make_flat_list_of_images(images)
        made = [self._one(image, options) for image in pictures]
        joined = {name: torch.cat([one[name] for one in made]) for name in made[0]}
        return BatchFeature(joined, tensor_type=return_tensors)

    def _one(self, image: Any, options: dict[str, Any]) -> Any:
        made = self.inner(image, return_tensors="pt", **options)
        budget = keep_count(self._tokens(made), self.rate)
        pixels = budget * (self.inner.patch_size * self.inner.merge_size) ** 2
        while self._tokens(made) > budget:  # not once alone: a thin picture gets more than its limit
            size = {"shortest_edge": min(pixels, self.inner.size["shortest_edge"]), "longest_edge": pixels}
            made = self.inner(image, return_tensors="pt", **{**options, "size": size})
            pixels = max(1, pixels * 9 // 10)
        return made

    def _tokens(self, made: Any) -> int:
        return int(made["image_grid_thw"].prod()) // self.inner.merge_size**2


def _limits_pixels(image_processor: Any) -> bool:
    return "max_pixels" in getattr(getattr(image_processor, "valid_kwargs", None), "__annotations__", {})


def grid_side(tokens: int, rate: float) -> int:
    """Return the side of the largest square grid of patches with at most ``int(tokens * rate)`` of them."""
    return math.isqrt(keep_count(tokens, rate))


@contextmanager
def _asked_to_interpolate(tower: nn.Module) -> Iterator[None]:
    """Hand the tower the argument that makes it interpolate, where it does not always do so."""
    if INTERPOLATE not in _arguments(tower):
        yield
        return
    handle = tower.register_forward_pre_hook(_interpolating, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def _interpolates(tower: nn.Module) -> bool:
    return INTERPOLATE in _arguments(tower) or any(hasattr(part, INTERPOLATE) for part in _embeddings(tower))


def _arguments(tower: nn.Module) -> set[str]:
    """Return what the tower and its embeddings take; wrappers hand on what they do not name."""
    parts = (tower, *_embeddings(tower))
    return {name for part in parts for name in inspect.signature(part.forward).parameters}


def _embeddings(tower: nn.Module) -> list[nn.Module]:
    return [part for name, part in tower.named_modules() if name.rpartition(".")[2] == "embeddings"]


def _smaller(processor: ProcessorMixin, rate: float) -> ProcessorMixin:
    size, patch = dict(processor.image_processor.size), getattr(processor, "patch_size", None)
    side = size.get("height", size.get("shortest_edge"))
    is_tiled = hasattr(processor.image_processor, "image_grid_pinpoints")
    if is_tiled or patch is None or side is None or size.get("width", side) != side:
        raise ValueError(
            f"{type(processor).__name__} makes no square pictures of whole patches: it cannot be downsampled"
        )
    grid = grid_side((side // patch) ** 2, rate)
    made = copy.deepcopy(processor)
    square = {"height": grid * patch, "width": grid * patch}
    made.image_processor.crop_size = square
    made.image_processor.size = square if "height" in size else {"shortest_edge": grid * patch}
    return made


def _interpolating(tower: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return args, {**kwargs, INTERPOLATE: True}
