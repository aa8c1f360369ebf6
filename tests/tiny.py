"""The tiny random models and inputs of the evidence, and what tests alone ask of them."""

from __future__ import annotations

from evidence.tiny import IMAGE_TOKEN, IMAGE_TOKENS, PAD, VOCABULARY, batch, model, row, sparsifier

from dynamic_llava import methods

__all__ = [
    "IMAGE_TOKEN",
    "IMAGE_TOKENS",
    "PAD",
    "VOCABULARY",
    "batch",
    "model",
    "policies",
    "row",
    "sparsifier",
]


def policies(name: str) -> dict[str, str]:
    """Settings of one method for image tokens and, where it has one, for output tokens."""
    return {"image_policy": name, "text_policy": name if name in methods.names("output") else "random"}
