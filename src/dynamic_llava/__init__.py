"""Dynamic-LLaVA: multimodal models that keep only the image tokens and output tokens that matter."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    __version__: str
    from dynamic_llava import families, methods
    from dynamic_llava.checkpoints.load import load, load_model
    from dynamic_llava.config import SparsityConfig
    from dynamic_llava.sparsifier import Sparsifier

__all__ = ["Sparsifier", "SparsityConfig", "__version__", "families", "load", "load_model", "methods"]

_HOMES = {
    "Sparsifier": "sparsifier",
    "SparsityConfig": "config",
    "load": "checkpoints",
    "load_model": "checkpoints",
}


def __getattr__(name: str) -> Any:
    """Import a public name at its first use: torch takes seconds, and ``--help`` must not wait for it."""
    if name == "__version__":
        return importlib.import_module("importlib.metadata").version("dynamic-llava")
    if name in ("families", "methods"):
        return importlib.import_module(f"{__name__}.{name}")
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    """List the public names, also those that are not imported yet: tab completion asks for them."""
    return sorted({*__all__, *(name for name in globals() if name.startswith("__"))})
