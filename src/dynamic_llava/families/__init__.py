"""Families of models: one file each, named after the ``model_type`` of its config.

A family is data. It says where the decoder is, and which tokens are image tokens of which picture; the core
has no case for any of them.
"""

from __future__ import annotations

import importlib
import pkgutil
from typing import Any

from dynamic_llava.families.base import Family, Kind

__all__ = ["Family", "Kind", "family_of", "family_of_type", "known", "register"]

PAGE = "https://github.com/dynamic-llava/dynamic-llava/blob/main/docs/adding-a-model.md"
SHARED = {"base", "counting"}

_OWN: dict[str, Family] = {}


def known() -> list[str]:
    """Return the model types that have a family."""
    files = {module.name for module in pkgutil.iter_modules(__path__)} - SHARED
    return sorted(files | _OWN.keys())


def register(model_type: str, family: Family) -> None:
    """Add a family of one's own, for models whose config has this ``model_type``.

    Raises
    ------
    ValueError
        If there is another one for it.
    """
    if model_type in known() and _OWN.get(model_type) != family:
        raise ValueError(f"there is a family for model_type {model_type!r} already")
    _OWN[model_type] = family


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
            f"{', '.join(known())}, or add a family, see {PAGE}"
        )
    return family_of_type(model_type)


def family_of_type(model_type: str) -> Family:
    """Return the family of a known ``model_type``."""
    if model_type in _OWN:
        return _OWN[model_type]
    family: Family = importlib.import_module(f"{__name__}.{model_type}").FAMILY
    return family
