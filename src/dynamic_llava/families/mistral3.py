"""Mistral3: a picture has a token for each square of merged patches; marks at the ends of lines are text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from dynamic_llava.families.base import Family, Kind
from dynamic_llava.families.counting import is_chunk, lengths, refuse_chunk


def sizes(base: Any, given: Mapping[str, Any], encoded: Any, mask_BN: Tensor) -> Sequence[int]:
    """Count by the size of each picture."""
    if is_chunk(encoded):
        refuse_chunk()
    if encoded is not None:
        return lengths(encoded)
    square = base.config.vision_config.patch_size * base.config.spatial_merge_size
    return [int(height) // square * (int(width) // square) for height, width in given["image_sizes"]]


FAMILY = Family(kinds=(Kind(sizes),))
