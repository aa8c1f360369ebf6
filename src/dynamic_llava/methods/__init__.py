"""Methods of dropping tokens: one small class each, all with the interface of :class:`Policy`."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from dynamic_llava.config import SparsityConfig
from dynamic_llava.methods.base import Policy
from dynamic_llava.methods.evicting import EvictingPolicy, H2OPolicy, Held, StreamingPolicy
from dynamic_llava.methods.fastv import FastVPolicy
from dynamic_llava.methods.learned import LearnedPolicy, TrainRates
from dynamic_llava.methods.predictors import ImagePredictor, TextPredictor
from dynamic_llava.methods.random import RandomPolicy
from dynamic_llava.methods.uniform import UniformPolicy

__all__ = [
    "EvictingPolicy",
    "FastVPolicy",
    "H2OPolicy",
    "Held",
    "LearnedPolicy",
    "Policy",
    "RandomPolicy",
    "StreamingPolicy",
    "TrainRates",
    "UniformPolicy",
    "build",
]

EVICTING: dict[str, type[EvictingPolicy]] = {policy.name: policy for policy in (H2OPolicy, StreamingPolicy)}


def reads_attention(name: str) -> bool:
    """Return whether the policy called ``name`` ranks image tokens by attention weights."""
    return name == "fastv"


def evicting(name: str, rate: float) -> EvictingPolicy | None:
    """Return the policy called ``name`` if it gives up earlier output tokens, holding a share ``rate``."""
    return EVICTING[name](rate) if name in EVICTING else None


def held_before(config: SparsityConfig, kept_T: Tensor) -> Tensor:
    """Return how many output tokens of an answer were held before each was decoded, int64 ``[T]``.

    ``kept_T``, bool, tells which are held at its end: under most policies they were from the start.
    """
    policy = evicting(config.text_policy, config.text_keep_rate) if config.sparsify_text else None
    if policy is None:
        return kept_T.long().cumsum(0) - kept_T.long()
    return torch.tensor([min(fed, policy.budget(fed)) for fed in range(len(kept_T))])


def build(
    name: str,
    config: SparsityConfig,
    image_predictor: ImagePredictor,
    text_predictor: TextPredictor,
    noise: Callable[[Tensor], Tensor],
    train_rates: TrainRates | None = None,
    attention_KI: Tensor | None = None,
) -> Policy:
    """Return the policy called ``name``: see :class:`~dynamic_llava.SparsityConfig` for their names.

    ``train_rates`` are those of :class:`LearnedPolicy`; ``attention_KI`` is what a policy that
    :func:`reads_attention` ranks by.
    """
    match name:
        case "learned":
            return LearnedPolicy(image_predictor, text_predictor, noise, config.text_threshold, train_rates)
        case "random":
            return RandomPolicy(config.text_keep_rate, config.seed)
        case "uniform":
            return UniformPolicy(config.image_keep_rate, config.text_keep_rate)
        case "h2o" | "streaming":
            return EVICTING[name](config.text_keep_rate)
        case "fastv" if attention_KI is not None:
            return FastVPolicy(attention_KI)
    raise ValueError(f"unknown policy {name!r}")
