"""A look at attention weights that sdpa does not return: those of one query a row.

Legend: B batch, Q queries, S keys, H heads, G key/value heads, D head size.
"""

from __future__ import annotations

import torch
from torch import Tensor


class Probe:
    """Computes one row of attention weights from the queries and keys of each layer that it is handed to.

    Parameters
    ----------
    query_B
        Which query of each row, int64.
    seen_BS
        Which keys it sees; None stands for plain causal attention, or for a decoded token that sees every
        slot.

    Attributes
    ----------
    weights_BS
        Attention to each key, float32, mean over heads, summed over layers; None before a layer ran.
    """

    def __init__(self, query_B: Tensor, seen_BS: Tensor | None) -> None:
        self.query_B = query_B
        self.seen_BS = seen_BS
        self.weights_BS: Tensor | None = None

    def look(self, q_BHQD: Tensor, k_BGSD: Tensor, scaling: float) -> None:
        """Compute the weights from what the attention function is called with."""
        batch, groups, keys, _ = k_BGSD.shape
        rows_B = torch.arange(batch, device=q_BHQD.device)
        query_B = self.query_B.to(q_BHQD.device)
        q_BGRD = q_BHQD[rows_B, :, query_B].unflatten(1, (groups, -1))
        scores_BGRS = (q_BGRD @ k_BGSD.mT).float() * scaling
        seen_BS = self.seen_BS
        if seen_BS is None:
            last_B1 = query_B[:, None] + keys - q_BHQD.shape[2]
            seen_BS = torch.arange(keys, device=query_B.device) <= last_B1
        scores_BGRS = scores_BGRS.masked_fill(~seen_BS[:, None, None].to(scores_BGRS.device), -torch.inf)
        weights_BS = scores_BGRS.softmax(-1).mean((1, 2))
        self.weights_BS = (
            weights_BS if self.weights_BS is None else self.weights_BS + weights_BS.to(query_B.device)
        )
