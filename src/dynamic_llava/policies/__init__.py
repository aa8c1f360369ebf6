"""Methods of dropping tokens: one small class each, all with the interface of :class:`Policy`."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from dynamic_llava.config import SparsityConfig
from dynamic_llava.policies.base import Policy
from dynamic_llava.policies.learned import LearnedPolicy
from dynamic_llava.policies.random import RandomPolicy
from dynamic_llava.policies.uniform import UniformPolicy
from dynamic_llava.predictors import ImagePredictor, TextPredictor

__all__ = ["LearnedPolicy", "Policy", "RandomPolicy", "UniformPolicy", "build"]


def build(
    name: str,
    config: SparsityConfig,
    image_predictor: ImagePredictor,
    text_predictor: TextPredictor,
    noise: Callable[[Tensor], Tensor],
) -> Policy:
    """Return the policy called ``name``, one of :data:`dynamic_llava.config.POLICIES`."""
    match name:
        case "learned":
            return LearnedPolicy(image_predictor, text_predictor, noise)
        case "random":
            return RandomPolicy(config.text_keep_rate, config.seed)
        case "uniform":
            return UniformPolicy(config.image_keep_rate, config.text_keep_rate)
    raise ValueError(f"unknown policy {name!r}")
