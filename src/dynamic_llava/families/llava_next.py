"""LLaVA-NeXT: a picture is a small copy and tiles without padding, a newline token after each line."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

from dynamic_llava.families.base import Family, Kind
from dynamic_llava.families.counting import is_chunk, lengths, runs_of_chunk


def tiles(config: Any, image_size: Tensor) -> int:
    """Return how many tiles a picture of this height and width makes, its small copy included."""
    tile = config.vision_config.image_size
    return int(image_size_to_num_patches(image_size, config.image_grid_pinpoints, tile))


def packed(base: Any, counts: Sequence[int], image_sizes: Tensor, **options: Any) -> list[int]:
    """Return how many tokens the model itself makes of so many tiles of each picture; computes nothing."""
    vision = base.config.vision_config
    patches = (vision.image_size // vision.patch_size) ** 2
    features = [torch.empty(count, patches, 1, device="meta") for count in counts]
    newline = torch.empty(1, device="meta")
    made, _ = base.pack_image_features(features, image_sizes, image_newline=newline, **options)
    return [len(picture) for picture in made]


def sizes(base: Any, given: Mapping[str, Any], encoded: Any, mask_BN: Tensor) -> Sequence[int]:
    """Count as the model packs the features of the tiles."""
    if is_chunk(encoded):
        return runs_of_chunk(mask_BN)
    if encoded is not None:
        return lengths(encoded)
    strategy = given.get("vision_feature_select_strategy") or base.config.vision_feature_select_strategy
    counts = [tiles(base.config, size) for size in given["image_sizes"]]
    return packed(base, counts, given["image_sizes"], vision_feature_select_strategy=strategy)


FAMILY = Family(kinds=(Kind(sizes),))
