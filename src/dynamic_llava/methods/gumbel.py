"""Straight-through Gumbel masks, at the logits' own rate or at a given one (paper, eq. 5).

Legend: B batch, N tokens.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def exponential_noise(logits: Tensor) -> Tensor:
    """Draw Exp(1) noise in the shape of ``logits``; its negative logarithm is Gumbel noise."""
    return torch.empty_like(logits).exponential_()


def straight_through(logits: Tensor, tau: float, noise: Callable[[Tensor], Tensor]) -> Tensor:
    """Sample hard keep masks whose gradient is that of the soft ones (paper, eq. 5).

    Parameters
    ----------
    logits
        ``[..., 2]``, channel 0 means keep.
    tau
        Temperature of the Gumbel softmax, greater than 0.
    noise
        Draws Exp(1) noise in the shape of the logits, such as :func:`exponential_noise`.

    Returns
    -------
    Tensor
        ``[...]``, float32, exactly 0 or 1.
    """
    logits = logits.float()  # in half precision the noise can be 0, and its logarithm infinite
    soft = ((logits.log_softmax(-1) - noise(logits).log()) / tau).softmax(-1)
    keep = soft[..., 0]
    hard = (soft.argmax(-1) == 0).to(keep.dtype)
    return hard + (keep - keep.detach())


WIDEST = 20.0  # a margin whose keep probability is 0 or 1 in float32
BISECTIONS = 40


@torch.no_grad()
def _shift_to_rate(margin_BN: Tensor, rate: float, valid_BN: Tensor) -> Tensor:
    """Return what to add to each row's margins so that their mean keep probability is ``rate``: [B, 1]."""
    low_B1 = -margin_BN.amax(-1, keepdim=True) - WIDEST
    high_B1 = -margin_BN.amin(-1, keepdim=True) + WIDEST
    count_B1 = valid_BN.sum(-1, keepdim=True).clamp(min=1)
    for _ in range(BISECTIONS):
        middle_B1 = (low_B1 + high_B1) / 2
        share_B1 = ((margin_BN + middle_B1).sigmoid() * valid_BN).sum(-1, keepdim=True) / count_B1
        low_B1 = torch.where(share_B1 < rate, middle_B1, low_B1)
        high_B1 = torch.where(share_B1 < rate, high_B1, middle_B1)
    return (low_B1 + high_B1) / 2


def at_rate(logits_BN2: Tensor, rate: float, valid_BN: Tensor) -> Tensor:
    """Shift the keep logits of each row so that the Gumbel softmax keeps ``rate`` of its tokens on average.

    The gradient counts what the shift takes back when a logit grows: only the ranking within a row is
    learned, and any rate can be asked for.

    Parameters
    ----------
    logits_BN2
        Keep and drop logits.
    rate
        In (0, 1).
    valid_BN
        Which tokens count; bool.
    """
    logits_BN2 = logits_BN2.float()
    if not logits_BN2.numel():
        return logits_BN2
    keep_BN, drop_BN = logits_BN2.unbind(-1)
    margin_BN = keep_BN - drop_BN
    shift_B1 = _shift_to_rate(margin_BN.detach(), rate, valid_BN)
    # The shift s(m) solves sum sigmoid(m + s) = rate * N, so ds/dm = -p (1 - p) / sum p (1 - p).
    with torch.no_grad():
        share_BN = (margin_BN + shift_B1).sigmoid()
        tiny = torch.finfo(share_BN.dtype).tiny  # where no token is in doubt, all take the same part
        doubt_BN = (share_BN * (1 - share_BN)).clamp(min=tiny) * valid_BN
        weight_BN = doubt_BN / doubt_BN.sum(-1, keepdim=True).clamp(min=tiny)
    followed_B1 = (weight_BN * (margin_BN - margin_BN.detach())).sum(-1, keepdim=True)
    return torch.stack([keep_BN + shift_B1 - followed_B1, drop_BN], dim=-1)
