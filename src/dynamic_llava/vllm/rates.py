"""How much of a request stays: as trained, as the server was started, or as the request asks."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from dynamic_llava.config import SparsityConfig

NAMES = ("image_keep_rate", "text_keep_rate", "dense")
"""What a request may set, under these names in ``vllm_xargs`` or ``SamplingParams.extra_args``."""

EXPLAIN = "explain"
"""Beside them: whether the request's client wants to be told which tokens were kept, on any server."""


@dataclass(frozen=True)
class Rates:
    """The keep rates of one request, as numbers that decide; a dense request is one that drops nothing.

    Attributes
    ----------
    image
        Share of each picture's tokens that stays; 1 keeps all.
    threshold
        Margin of the keep logit above which an output token stays; -inf keeps all.
    """

    image: float
    threshold: float

    @classmethod
    def of(cls, config: SparsityConfig) -> Rates:
        """Return what a config says."""
        return cls(
            float(config.image_keep_rate) if config.sparsify_image else 1.0,
            config.text_threshold if config.sparsify_text else -math.inf,
        )


def server_config(trained: SparsityConfig, additional: Mapping[str, Any]) -> SparsityConfig:
    """Return the trained config with what the server was started with, ``additional_config["sparsity"]``.

    Raises
    ------
    ValueError
        A name is unknown or a value out of range.
    """
    return changed(trained, {key: value for key, value in settings(additional).items() if key != "fixed"})


def settings(additional: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the server's own settings: rates, and ``fixed``, which forbids requests to set theirs.

    Raises
    ------
    ValueError
        They are no JSON object.
    """
    found = additional.get("sparsity", {})
    if not isinstance(found, Mapping):
        raise ValueError(f"additional_config: sparsity is {found!r}, it must be an object with {_listed()}")
    return found


def request_rates(config: SparsityConfig, extra: Mapping[str, Any] | None) -> Rates:
    """Return the rates of a request, given the server's config and the request's extra arguments.

    Raises
    ------
    ValueError
        A rate is out of range.
    """
    asked = {name: value for name, value in (extra or {}).items() if name in NAMES}
    return Rates.of(changed(config, asked) if asked else config)


def explains(extra: Mapping[str, Any] | None) -> bool:
    """Return whether a request wants to be told which tokens were kept, given its extra arguments.

    Raises
    ------
    ValueError
        It is neither true nor false.
    """
    asked = (extra or {}).get(EXPLAIN, False)
    if asked not in (False, True):
        raise ValueError(f"sparsity: {EXPLAIN} is {asked!r}, it must be true or false")
    return bool(asked)


def changed(config: SparsityConfig, asked: Mapping[str, Any]) -> SparsityConfig:
    """Return ``config`` with rates of :data:`NAMES` changed.

    Raises
    ------
    ValueError
        A name is unknown or a value out of range.
    """
    if unknown := sorted(set(asked) - set(NAMES)):
        raise ValueError(f"sparsity: {', '.join(unknown)} is unknown, choose from {_listed()}")
    rates = {name: value for name, value in asked.items() if name != "dense"}
    if wrong := [name for name, value in rates.items() if isinstance(value, bool)]:
        raise ValueError(f"sparsity: {wrong[0]} is {rates[wrong[0]]}: it must be a number in (0, 1]")
    dense = asked.get("dense", False)
    if dense not in (False, True):  # 0 and 1 are what vllm_xargs can carry
        raise ValueError(f"sparsity: dense is {dense!r}, it must be true or false")
    if dense:
        rates |= {"sparsify_image": False, "sparsify_text": False}
    return replace(config, **rates)


def _listed() -> str:
    return ", ".join(NAMES)
