"""Gemma3: every picture has as many tokens, which see each other; most layers have a sliding window."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from dynamic_llava.families.base import Family, Kind
from dynamic_llava.families.counting import fixed


def sizes(base: Any, given: Mapping[str, Any], encoded: Any, mask_BN: Tensor) -> Sequence[int]:
    """Count pictures: all have as many tokens."""
    return fixed(base.config.mm_tokens_per_image, mask_BN)


FAMILY = Family(kinds=(Kind(sizes),))
