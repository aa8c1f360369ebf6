"""LLaVA-1.5, where every picture has as many image tokens, and Pixtral, where its size decides."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from dynamic_llava.families.base import Family, Kind
from dynamic_llava.families.counting import even_share, fixed, is_chunk, lengths, refuse_chunk


def sizes(base: Any, given: Mapping[str, Any], encoded: Any, mask_BN: Tensor) -> Sequence[int]:
    """Count by the features, or by the size of each picture in patches, or evenly."""
    if is_chunk(encoded):
        if base.config.vision_config.model_type == "pixtral":
            refuse_chunk()
        return fixed(base.config.image_seq_length, mask_BN)
    if encoded is not None:
        return lengths(encoded)
    if given.get("image_sizes") is not None:
        patch = base.vision_tower.patch_size
        return [int(height) // patch * (int(width) // patch) for height, width in given["image_sizes"]]
    return even_share(len(given["pixel_values"]), mask_BN)


FAMILY = Family(kinds=(Kind(sizes),))
