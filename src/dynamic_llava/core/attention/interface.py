"""Attention with weighted keys, for the masked pass of training, and with a probe.

The stock layers call it through transformers' ``AttentionInterface``; nothing else needs it, so a model gets
it at the first call that does.

Legend: B batch, N tokens, H heads, G key/value heads, D head size.
"""

from __future__ import annotations

import copy
import functools
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedConfig
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from dynamic_llava.core.attention.blocked import masked_attention
from dynamic_llava.core.attention.definition import masked_softmax
from dynamic_llava.core.attention.probe import Probe

IMPLEMENTATIONS = ("sdpa", "eager", "flex_attention", "flash_attention_2")
PREFIX = "dynamic_llava_"


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


@dataclass(frozen=True)
class _Named:
    """The attention function that transformers calls by a name of ours.

    It is the stock one, extended by ``key_weights``, which take its place, and a probe.
    """

    implementation: str

    def __call__(
        self,
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
            out = self._stock(module)(self._named(module), query, key, value, attention_mask, **kwargs)
            return cast(tuple[Tensor, Tensor | None], out)
        if kwargs.get("dropout"):
            raise ValueError("attention_dropout is not supported in the training pass: set it to 0")
        out = key_weights.attend(query, key, value, attention_mask, kwargs["scaling"])
        return out.transpose(1, 2).contiguous(), None

    def _stock(self, module: nn.Module) -> Any:
        if self.implementation == "eager":  # each model has its own
            return sys.modules[type(module).__module__].eager_attention_forward
        return ALL_ATTENTION_FUNCTIONS[self.implementation]

    def _named(self, module: nn.Module) -> Any:
        """Return the module as its stock function knows it: that of flash attention asks for its own name."""
        if "flash" not in self.implementation:
            return module
        return _Seen(module, config=_Seen(module.config, _attn_implementation=self.implementation))


class _Seen:
    """An object seen with some of its attributes changed."""

    def __init__(self, seen: Any, **changed: Any) -> None:
        self.__dict__.update(changed, _seen=seen)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_seen"], name)


def use(layers: Iterable[nn.Module]) -> list[tuple[nn.Module, Any]]:
    """Let the attention of ``layers`` take key weights and probes; return each module with its own config.

    They get a config of their own: the shared one, which users read and set, stays as it is. A call without
    key weights and probes computes what it did before.
    """
    changed: list[tuple[nn.Module, Any]] = []
    copies: dict[int, Any] = {}
    for module in (module for layer in layers for module in layer.modules()):
        config = getattr(module, "config", None)
        if not isinstance(config, PreTrainedConfig):
            continue
        if id(config) not in copies:
            copies[id(config)] = copy.copy(config)
            copies[id(config)]._attn_implementation = PREFIX + config._attn_implementation
        changed.append((module, config))
        module.config = copies[id(config)]
    return changed


def give_back(changed: Iterable[tuple[nn.Module, Any]]) -> None:
    """Undo :func:`use`."""
    for module, config in changed:
        module.config = config


for _implementation in IMPLEMENTATIONS:  # at import, so that an unpickled model finds its functions
    AttentionInterface.register(PREFIX + _implementation, _Named(_implementation))
