"""Attention with policy-weighted keys, for the masked pass of training.

The stock layers call it through transformers' ``AttentionInterface``; without a policy they get the stock
function.

Legend: B batch, N tokens, H heads, G key/value heads, D head size.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.integrations.flex_attention import flex_attention_forward
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.models.llama.modeling_llama import eager_attention_forward

from dynamic_llava.core.attention.blocked import masked_attention
from dynamic_llava.core.attention.definition import masked_softmax
from dynamic_llava.core.attention.probe import Probe

STOCK_ATTENTION = {
    "sdpa": sdpa_attention_forward,
    "eager": eager_attention_forward,
    "flex_attention": flex_attention_forward,
}


@dataclass(frozen=True)
class KeyWeights:
    """How keys are weighed in a training pass.

    ``policy_BN`` has the weights in [0, 1]; ``eps`` and ``dropped_key_bound`` are those of
    :func:`~dynamic_llava.core.attention.definition.masked_softmax`; ``is_masked`` False leaves the softmax
    plain and takes only the values of dropped keys, for ablations. That and ``eps`` above 0 are N x N in
    memory.
    """

    policy_BN: Tensor
    eps: float
    dropped_key_bound: float
    is_masked: bool

    def attend(
        self, q_BHND: Tensor, k_BGND: Tensor, v_BGND: Tensor, visible_B1NN: Tensor, scaling: float
    ) -> Tensor:
        """Return what attention returns, ``[B, H, N, D]``."""
        qkv = (q_BHND, k_BGND, v_BGND)
        if not self.is_masked:
            return _attend(*qkv, visible_B1NN, scaling, self._without_values)
        if self.eps > 0:
            official = functools.partial(masked_softmax, policy_BN=self.policy_BN, eps=self.eps)
            return _attend(*qkv, visible_B1NN, scaling, official)
        return masked_attention(*qkv, self.policy_BN, visible_B1NN, scaling, self.dropped_key_bound)

    def _without_values(self, scores_BHNN: Tensor) -> Tensor:
        """Return a plain softmax, in which dropped keys keep their share and get no value."""
        own_NN = torch.eye(scores_BHNN.shape[-1], dtype=torch.bool, device=scores_BHNN.device)
        return scores_BHNN.softmax(-1) * torch.where(own_NN, 1.0, self.policy_BN.float()[:, None, None, :])


def _attend(
    q_BHND: Tensor,
    k_BGND: Tensor,
    v_BGND: Tensor,
    visible_B1NN: Tensor,
    scaling: float,
    weigh: Callable[[Tensor], Tensor],
) -> Tensor:
    """Attend with what ``weigh`` makes of the scores, N x N in memory."""
    repeats = q_BHND.shape[1] // k_BGND.shape[1]
    k_BHND, v_BHND = (x_BGND.repeat_interleave(repeats, dim=1) for x_BGND in (k_BGND, v_BGND))
    with torch.autocast(q_BHND.device.type, enabled=False):
        scores_BHNN = (q_BHND.float() @ k_BHND.float().mT) * scaling
        weights_BHNN = weigh(scores_BHNN.masked_fill(~visible_B1NN, -torch.inf))
        return (weights_BHNN @ v_BHND.float()).to(v_BHND.dtype)


def _policy_attention(stock: Any) -> Any:
    """Return ``stock``, extended by ``key_weights``, which take its place, and a probe."""

    def forward(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Any,
        key_weights: KeyWeights | None = None,
        probe: Probe | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        if probe is not None:
            probe.look(query, key, kwargs["scaling"])
        if key_weights is None:
            return stock(module, query, key, value, attention_mask, **kwargs)
        if kwargs.get("dropout"):
            raise ValueError("attention_dropout is not supported in the training pass: set it to 0")
        out = key_weights.attend(query, key, value, attention_mask, kwargs["scaling"])
        return out.transpose(1, 2).contiguous(), None

    return forward


def register(implementation: str) -> str:
    """Make the policy-aware form of a stock attention known to transformers and return its name."""
    name = f"dynamic_llava_{implementation}"
    AttentionInterface.register(name, _policy_attention(STOCK_ATTENTION[implementation]))
    return name
