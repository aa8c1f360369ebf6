"""Projectors of official models that transformers' LLaVA does not have: linear, identity, other depths."""

from __future__ import annotations

import re
from typing import Any

from torch import nn

STOCK = "mlp2x_gelu"


def check_projector(name: str, source: str) -> None:
    """Raise ``ValueError`` if a projector is unknown."""
    if name not in ("linear", "identity") and not re.fullmatch(r"mlp[1-9]\d*x_gelu", name):
        raise ValueError(
            f"{source}: mm_projector_type is {name!r}: known are linear, identity and mlpNx_gelu"
        )


def build_projector(name: str, vision: int, hidden: int) -> nn.Module:
    """Return the projector from ``vision`` to ``hidden`` features, tensors named as in the official code."""
    if name == "identity":
        return nn.Identity()
    if name == "linear":
        return nn.Linear(vision, hidden)
    depth = int(name.removeprefix("mlp").removesuffix("x_gelu"))
    layers: list[nn.Module] = [nn.Linear(vision, hidden)]
    for _ in range(1, depth):
        layers += [nn.GELU(), nn.Linear(hidden, hidden)]
    return nn.Sequential(*layers)


def fit_projector(model: Any) -> nn.Module | None:
    """Give a stock model the projector that its config names; return it, or None where it is the stock one.

    A config names one by ``mm_projector_type``, which only this library reads.
    """
    config = model.config
    name = getattr(config, "mm_projector_type", STOCK)
    if name == STOCK:
        return None
    stock = model.model.multi_modal_projector.linear_1.weight
    made = build_projector(name, config.vision_config.hidden_size, config.text_config.hidden_size)
    model.model.multi_modal_projector = made.to(device=stock.device, dtype=stock.dtype)
    return made
