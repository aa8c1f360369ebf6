"""Qwen3-VL: as Qwen2-VL, but its first layers are given features of the tower too, at all image tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from dynamic_llava.families import qwen2_vl
from dynamic_llava.families.base import Family, Kind
from dynamic_llava.families.counting import is_chunk, refuse_chunk


def first_layer(config: Any) -> int:
    """Return the layer after the last one that the model adds features behind (deepstack)."""
    return max(1, len(config.vision_config.deepstack_visual_indexes))


def video_sizes(base: Any, given: Mapping[str, Any], encoded: Any, mask_BN: Tensor) -> Sequence[int]:
    """Count by the grid of each video; timestamps stand between its frames."""
    if is_chunk(encoded):
        refuse_chunk()
    return qwen2_vl.video_sizes(base, given, encoded, mask_BN)


FAMILY = Family(
    kinds=(Kind(qwen2_vl.sizes), Kind(video_sizes, "video_token_id", "pixel_values_videos", "video")),
    first_layer=first_layer,
    tower="visual",
    projectors=("visual.merger", "visual.deepstack_merger_list"),
)
