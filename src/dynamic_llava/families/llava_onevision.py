"""LLaVA-OneVision: a picture is a small copy and tiles; of several pictures in a prompt, the copy alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from dynamic_llava.families.base import Family, Kind
from dynamic_llava.families.counting import even_share, is_chunk, lengths, runs_of_chunk
from dynamic_llava.families.llava_next import packed, tiles


def sizes(base: Any, given: Mapping[str, Any], encoded: Any, mask_BN: Tensor) -> Sequence[int]:
    """Count as the model packs the features of the tiles."""
    if is_chunk(encoded):
        return runs_of_chunk(mask_BN)
    if encoded is not None:
        return lengths(encoded)
    config, image_sizes = base.config, given["image_sizes"]
    in_a_row = given.get("batch_num_images")
    is_tiled = [True] * len(image_sizes)
    if in_a_row is not None:
        is_tiled = [int(count) == 1 for count in in_a_row for _ in range(int(count))]
    counts = [tiles(config, size) if tiled else 1 for size, tiled in zip(image_sizes, is_tiled, strict=True)]
    ratio = given.get("vision_aspect_ratio") or config.vision_aspect_ratio
    return packed(base, counts, image_sizes, vision_aspect_ratio=ratio)


def video_sizes(base: Any, given: Mapping[str, Any], encoded: Any, mask_BN: Tensor) -> Sequence[int]:
    """Share evenly: the videos of a call have as many frames as each other."""
    if is_chunk(encoded):
        return runs_of_chunk(mask_BN)
    videos = given["pixel_values_videos"] if encoded is None else encoded.pooler_output
    return even_share(len(videos), mask_BN)


FAMILY = Family(
    kinds=(Kind(sizes), Kind(video_sizes, "video_token_id", "pixel_values_videos", "video")),
)
