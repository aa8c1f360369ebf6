"""How many image tokens of a picture stay, and which.

Legend: K pictures, I image tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor


def keep_count(tokens: int, rate: float) -> int:
    """Return how many of ``tokens`` a keep rate leaves: the product truncated, at least one."""
    return max(1, int(tokens * rate))


def top_k_mask(scores_KI: Tensor, count: int) -> Tensor:
    """Return a bool mask ``[K, I]`` of the ``count`` best-scored tokens of each picture."""
    best = scores_KI.topk(count, dim=-1).indices
    return torch.zeros_like(scores_KI, dtype=torch.bool).scatter_(-1, best, True)
