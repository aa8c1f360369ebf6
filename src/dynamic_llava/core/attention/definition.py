"""The masked softmax of training, as the paper defines it.

Legend: B batch, N tokens, H heads.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def masked_softmax(
    scores_BHNN: Tensor, policy_BN: Tensor, eps: float = 0.0, dropped_key_bound: float = 1e6
) -> Tensor:
    """Softmax over keys weighted by a policy; a query always sees its own key (paper, eq. 6).

    ``W = (E + eps/N) / (sum E + eps)`` with ``E = exp(S - max) * P`` and ``P_ij = policy_j``, but 1 where i =
    j. This is the definition, N x N in memory; without eps, training computes it by
    :func:`~dynamic_llava.core.attention.blocked.masked_attention`.

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
