"""Evenly spaced indices."""

from __future__ import annotations

from torch import Tensor


def evenly_spaced(index: Tensor, rate: float) -> Tensor:
    """Return a bool like ``index``: of the first n indices, exactly ``int(n * rate)`` are True."""
    index = index.double()
    return ((index + 1) * rate).floor() > (index * rate).floor()
