"""Methods of dropping tokens: one file each, ``image/NAME.py`` and ``output/NAME.py``."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from dynamic_llava.methods.registry import (
    by_name,
    find,
    image_method,
    names,
    output_method,
    register,
    settings_of,
    summary_of,
)

if TYPE_CHECKING:
    from dynamic_llava.methods.base import (
        Draw,
        EvictingMethod,
        Held,
        ImageMethod,
        Method,
        OutputMethod,
        Outputs,
        Pictures,
        TrainRates,
    )

__all__ = [
    "Draw",
    "EvictingMethod",
    "Held",
    "ImageMethod",
    "Method",
    "OutputMethod",
    "Outputs",
    "Pictures",
    "TrainRates",
    "by_name",
    "find",
    "image_method",
    "names",
    "output_method",
    "register",
    "settings_of",
    "summary_of",
]


def __getattr__(name: str) -> Any:
    """Import what needs torch when it is asked for: commands list the names of methods without it."""
    if name in __all__:
        return getattr(importlib.import_module("dynamic_llava.methods.base"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    """List the public names, also those that are not imported yet."""
    return sorted({*__all__, *(name for name in globals() if name.startswith("__"))})
