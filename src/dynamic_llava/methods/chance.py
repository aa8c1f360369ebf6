"""Chance that depends on an index and a seed alone: the same tokens, whatever else is in a batch."""

from __future__ import annotations

from torch import Tensor

IMAGE_STREAM, TEXT_STREAM = 1, 2  # keep the draws for image tokens and output tokens apart


def hashed_uniform(index: Tensor, seed: int, stream: int) -> Tensor:
    """Return numbers in [0, 1), a pure function of index, seed and stream (splitmix64's mixer)."""
    x = index.long() + ((4 * seed + stream) * 0x9E3779B97F4A7C15 + 1) % 2**63
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        x = (x ^ ((x >> shift) & ((1 << (64 - shift)) - 1))) * (factor - 2**64)
    x = x ^ ((x >> 31) & (2**33 - 1))
    return (x & (2**53 - 1)).double() / 2**53
