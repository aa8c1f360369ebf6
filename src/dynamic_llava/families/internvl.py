"""InternVL: a picture is all tiles between ``<img>`` and ``</img>``; each frame of a video is one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from dynamic_llava.families.base import Family, Kind
from dynamic_llava.families.counting import is_chunk, runs, runs_of_chunk


def sizes(base: Any, given: Mapping[str, Any], encoded: Any, mask_BN: Tensor) -> Sequence[int]:
    """Count what stands between the marks."""
    return runs_of_chunk(mask_BN) if is_chunk(encoded) else runs(mask_BN)


FAMILY = Family(kinds=(Kind(sizes),))
