"""Qwen2-VL: a picture has a token for each square of merged patches, a video for each of each frame."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from dynamic_llava.families.base import Family, Kind
from dynamic_llava.families.counting import is_chunk, lengths, runs_of_chunk


def sizes(base: Any, given: Mapping[str, Any], encoded: Any, mask_BN: Tensor) -> Sequence[int]:
    """Count by the grid of each picture."""
    return _by_grid(base, given, "image_grid_thw", encoded, mask_BN)


def video_sizes(base: Any, given: Mapping[str, Any], encoded: Any, mask_BN: Tensor) -> Sequence[int]:
    """Count by the grid of each video, all frames together."""
    return _by_grid(base, given, "video_grid_thw", encoded, mask_BN)


def _by_grid(base: Any, given: Mapping[str, Any], grid: str, encoded: Any, mask_BN: Tensor) -> Sequence[int]:
    if is_chunk(encoded):
        return runs_of_chunk(mask_BN)
    if encoded is not None:
        return lengths(encoded)
    merged: int = base.config.vision_config.spatial_merge_size
    return [int(count) // merged**2 for count in given[grid].prod(-1)]


FAMILY = Family(
    kinds=(Kind(sizes), Kind(video_sizes, "video_token_id", "pixel_values_videos", "video")),
    tower="visual",
    projectors=("visual.merger",),
)
