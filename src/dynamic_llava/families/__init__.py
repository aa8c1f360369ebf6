"""Families of models: one file each, named after the ``model_type`` of its config.

A family is data. It says where the decoder is, and which tokens are image tokens of which picture; the core
has no case for any of them.
"""

from __future__ import annotations

import importlib
import pkgutil
from typing import Any

from dynamic_llava.families.base import Family

__all__ = ["Family", "family_of", "known"]


def known() -> list[str]:
    """Return the model types that have a family."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__) if module.name != "base")


def family_of(model: Any) -> Family:
    """Return the family of a model, found by its config's ``model_type``.

    Raises
    ------
    ValueError
        If there is none.
    """
    model_type = getattr(getattr(model, "config", None), "model_type", "")
    if model_type not in known():
        raise ValueError(
            f"{type(model).__name__} is of no known family (model_type {model_type!r}): attach to one of "
            f"{', '.join(known())}"
        )
    family: Family = importlib.import_module(f"{__name__}.{model_type}").FAMILY
    return family
