"""Attention with policy-weighted keys, for the masked pass of training.

The stock layers call it through transformers' ``AttentionInterface``; without a policy they get the stock
function.

Legend: B batch, N tokens, H heads, G key/value heads, D head size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.integrations.flex_attention import flex_attention_forward
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.models.llama.modeling_llama import eager_attention_forward

from dynamic_llava.probe import Probe
from dynamic_llava.selection import MAX_DROPPED, masked_softmax

STOCK_ATTENTION = {
    "sdpa": sdpa_attention_forward,
    "eager": eager_attention_forward,
    "flex_attention": flex_attention_forward,
}


class _MaskedAttention(torch.autograd.Function):
    """``masked_softmax(q k^T) v`` without ever storing more than one N x N tensor.

    The policy scales columns and its own-key exemption touches only the diagonal, so both fold into the keys
    and values. With R = exp(S - max) / sum, W = R * P and G = R * (dW - rowsum(dW * W)): dS = G * P and dP =
    G.
    """

    @staticmethod
    def forward(
        ctx: Any,
        q_BHND: Tensor,
        k_BHND: Tensor,
        v_BHND: Tensor,
        policy_BN: Tensor,
        hidden_B1NN: Tensor,
        scaling: float,
    ) -> Tensor:
        q, k, v, policy = q_BHND.float(), k_BHND.float(), v_BHND.float(), policy_BN.float()[:, None, :, None]
        scores = (q * scaling) @ k.mT
        scores.masked_fill_(hidden_B1NN, -torch.inf)
        own = scores.diagonal(dim1=-2, dim2=-1)[..., None].clone()
        highest = scores.masked_fill((policy == 0).mT, -torch.inf).amax(-1, keepdim=True).maximum(own)
        ratio = scores.sub_(highest).clamp_(max=MAX_DROPPED).exp_()
        diagonal = ratio.diagonal(dim1=-2, dim2=-1)[..., None]
        ratio.div_(ratio @ policy.expand(-1, q.shape[1], -1, -1) + diagonal * (1 - policy))
        out = ratio @ (policy * v) + diagonal * (1 - policy) * v
        ctx.save_for_backward(q_BHND, k_BHND, v_BHND, policy_BN, ratio, out)
        ctx.scaling = scaling
        return out.to(v_BHND.dtype)

    @staticmethod
    def backward(ctx: Any, grad_BHND: Tensor) -> tuple[Tensor | None, ...]:
        with torch.autocast(grad_BHND.device.type, enabled=False):
            return _MaskedAttention._gradients(ctx, grad_BHND)

    @staticmethod
    def _gradients(ctx: Any, grad_BHND: Tensor) -> tuple[Tensor | None, ...]:
        q_BHND, k_BHND, v_BHND, policy_BN, ratio, out = ctx.saved_tensors
        q, k, v, policy = q_BHND.float(), k_BHND.float(), v_BHND.float(), policy_BN.float()[:, None, :, None]
        exempt = 1 - policy
        grad = grad_BHND.float()
        diagonal = ratio.diagonal(dim1=-2, dim2=-1)[..., None]
        dv = policy * (ratio.mT @ grad) + exempt * diagonal * grad
        g = (grad @ v.mT).sub_((grad * out).sum(-1, keepdim=True)).mul_(ratio)
        g_own = g.diagonal(dim1=-2, dim2=-1)[..., None].clone()
        dpolicy = (g.sum(-2)[..., None] - g_own).sum(1)[..., 0]
        dq = (g @ (policy * k) + g_own * exempt * k) * ctx.scaling
        dk = (policy * (g.mT @ q) + exempt * g_own * q) * ctx.scaling
        return dq.to(q_BHND), dk.to(k_BHND), dv.to(v_BHND), dpolicy.to(policy_BN), None, None


def masked_attention(
    q_BHND: Tensor, k_BHND: Tensor, v_BHND: Tensor, policy_BN: Tensor, visible_B1NN: Tensor, scaling: float
) -> Tensor:
    """Attend with keys weighted by a policy; each query sees its own key in full.

    Parameters
    ----------
    q_BHND, k_BHND, v_BHND
        Queries, keys, values of one length N.
    policy_BN
        Weight of each key in [0, 1]; gets a gradient, also where it is 0 (straight-through).
    visible_B1NN
        Bool, may broadcast; must be True on the diagonal.
    scaling
        Factor on the scores.

    Returns
    -------
    Tensor
        ``[B, H, N, D]``, computed in float32, in the dtype of ``v_BHND``. Equal to
        :func:`~dynamic_llava.selection.masked_softmax` times the values, also under autocast.
    """
    with torch.autocast(q_BHND.device.type, enabled=False):
        return _MaskedAttention.apply(q_BHND, k_BHND, v_BHND, policy_BN, ~visible_B1NN, scaling)


def _official_attention(
    q_BHND: Tensor,
    k_BHND: Tensor,
    v_BHND: Tensor,
    policy_BN: Tensor,
    visible_B1NN: Tensor,
    scaling: float,
    eps: float,
) -> Tensor:
    """Attend with the weights of the official code, whose eps lets a little of hidden keys through."""
    with torch.autocast(q_BHND.device.type, enabled=False):
        scores_BHNN = (q_BHND.float() @ k_BHND.float().mT) * scaling
        weights_BHNN = masked_softmax(scores_BHNN.masked_fill(~visible_B1NN, -torch.inf), policy_BN, eps)
        return (weights_BHNN @ v_BHND.float()).to(v_BHND.dtype)


def _policy_attention(stock: Any) -> Any:
    """Return ``stock``, extended by ``policy_BN``, which selects :func:`masked_attention`, and a probe.

    ``policy_eps`` above 0 selects the definition with the official eps terms instead, which are not fused.
    """

    def forward(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Any,
        policy_BN: Tensor | None = None,
        policy_eps: float = 0.0,
        probe: Probe | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        if probe is not None:
            probe.look(query, key, kwargs["scaling"])
        if policy_BN is None:
            return stock(module, query, key, value, attention_mask, **kwargs)
        if kwargs.get("dropout"):
            raise ValueError("attention_dropout is not supported in the training pass: set it to 0")
        repeats = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(repeats, dim=1), value.repeat_interleave(repeats, dim=1)
        keyed = (query, key, value, policy_BN, attention_mask, kwargs["scaling"])
        out = _official_attention(*keyed, policy_eps) if policy_eps > 0 else masked_attention(*keyed)
        return out.transpose(1, 2).contiguous(), None

    return forward


def register(implementation: str) -> str:
    """Make the policy-aware form of a stock attention known to transformers and return its name."""
    name = f"dynamic_llava_{implementation}"
    AttentionInterface.register(name, _policy_attention(STOCK_ATTENTION[implementation]))
    return name
