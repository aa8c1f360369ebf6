"""Idefics3: a picture is cut into tiles of one size, and each tile is a picture of its own here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from dynamic_llava.families.base import Family, Kind
from dynamic_llava.families.counting import fixed


def sizes(base: Any, given: Mapping[str, Any], encoded: Any, mask_BN: Tensor) -> Sequence[int]:
    """Count tiles: all have as many tokens."""
    vision = base.config.vision_config
    patches: int = (vision.image_size // vision.patch_size) ** 2
    return fixed(patches // base.config.scale_factor**2, mask_BN)


FAMILY = Family(decoder="text_model", kinds=(Kind(sizes),), tower="vision_model", projectors=("connector",))
