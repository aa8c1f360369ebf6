"""Questions about pictures: the prompt, the answer, and what was kept of them."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dynamic_llava.chat.asking import ask, dense, encode
    from dynamic_llava.chat.images import open_image
    from dynamic_llava.chat.prompt import chat_answer, chat_prompt

__all__ = ["ask", "chat_answer", "chat_prompt", "dense", "encode", "open_image"]

_HOMES = {"ask": "asking", "dense": "asking", "encode": "asking", "open_image": "images"}


def __getattr__(name: str) -> Any:
    """Import a name at its first use: what does not ask a model need not wait for torch."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES.get(name, 'prompt')}"), name)


def __dir__() -> list[str]:
    """List the public names, also those that are not imported yet."""
    return sorted({*__all__, *(name for name in globals() if name.startswith("__"))})
