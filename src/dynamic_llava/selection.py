"""Selecting tokens: top-k, straight-through Gumbel, right-alignment, and a softmax over kept keys.

Legend: B batch, K pictures, I image tokens, N tokens, L kept tokens (padded), H heads, D head size.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor


def keep_count(tokens: int, rate: float) -> int:
    """Return how many of ``tokens`` a keep rate leaves: the product truncated, at least one."""
    return max(1, int(tokens * rate))


def top_k_mask(scores_KI: Tensor, count: int) -> Tensor:
    """Return a bool mask ``[K, I]`` of the ``count`` best-scored tokens of each picture."""
    best = scores_KI.topk(count, dim=-1).indices
    return torch.zeros_like(scores_KI, dtype=torch.bool).scatter_(-1, best, True)


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


def right_align(keep_BN: Tensor) -> tuple[Tensor, Tensor]:
    """Return where the kept tokens of each row lie, aligned to the right.

    Parameters
    ----------
    keep_BN
        Bool; the rows may keep different numbers of tokens.

    Returns
    -------
    index_BL, valid_BL
        Source position of each kept token in its original order (int64), and which of these columns are
        tokens and not padding (bool). L is the longest row's count.
    """
    length = int(keep_BN.sum(-1).max())
    order_BN = keep_BN.to(torch.uint8).argsort(dim=-1, stable=True)
    index_BL = order_BN[:, order_BN.shape[1] - length :]
    return index_BL, keep_BN.gather(1, index_BL)


def ordinals(answer_mask_BN: Tensor) -> Tensor:
    """Return the index of each answer token within its answer, int64 ``[B, N]``; meaningless elsewhere."""
    count_BN = answer_mask_BN.long().cumsum(-1)
    before_BN = count_BN.masked_fill(answer_mask_BN, 0).cummax(-1).values
    return count_BN - before_BN - 1


def gather_tokens(x_BNC: Tensor, index_BL: Tensor) -> Tensor:
    """Return ``x_BNC`` at ``index_BL``: ``[B, L, C]``."""
    return x_BNC.gather(1, index_BL[..., None].expand(-1, -1, x_BNC.shape[-1]))


def masked_softmax(
    scores_BHNN: Tensor, policy_BN: Tensor, eps: float = 0.0, dropped_key_bound: float = 1e6
) -> Tensor:
    """Softmax over keys weighted by a policy; a query always sees its own key (paper, eq. 6).

    ``W = (E + eps/N) / (sum E + eps)`` with ``E = exp(S - max) * P`` and ``P_ij = policy_j``, but 1 where i =
    j. This is the definition, N x N in memory; without eps, training computes it by
    :func:`~dynamic_llava.masked_attention.masked_attention`.

    Parameters
    ----------
    scores_BHNN
        Attention scores, ``-inf`` where a key is not visible.
    policy_BN
        Weight of each key in [0, 1].
    eps
        0 by default: hidden and dropped keys weigh exactly nothing. The official code uses 1e-6, with which
        every key, also a future one, weighs at least eps/N.
    dropped_key_bound
        Without eps: how many times the strongest kept key a dropped one weighs at most in the gradient to its
        mask. Its true derivative has no bound, though keeping the key could change the output only so much.

    Returns
    -------
    Tensor
        Weights, float32, rows sum to 1.
    """
    scores, tokens = scores_BHNN.float(), scores_BHNN.shape[-1]
    own_NN = torch.eye(tokens, dtype=torch.bool, device=scores.device)
    policy_B1NN = torch.where(own_NN, 1.0, policy_BN.float()[:, None, None, :])
    if eps > 0:
        weighted = (scores - scores.amax(-1, keepdim=True)).exp() * policy_B1NN
        return (weighted + eps / tokens) / (weighted.sum(-1, keepdim=True) + eps)
    # Over kept keys, the sum is >= 1; the clamp only bounds the gradient of a dropped, dominant key.
    highest = scores.masked_fill(policy_B1NN == 0, -torch.inf).amax(-1, keepdim=True)
    weighted = (scores - highest).clamp(max=math.log(dropped_key_bound)).exp() * policy_B1NN
    return weighted / weighted.sum(-1, keepdim=True)
