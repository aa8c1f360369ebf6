"""Models by name: the sizes that counting and measuring need, no weights."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from dynamic_llava.costs.shape import DecoderShape


@dataclass(frozen=True)
class Preset:
    """The sizes of a multimodal model's decoder, and of the predictors that fit it.

    Parameters
    ----------
    shape
        Sizes of the decoder.
    heads
        Attention heads; keys and values have as many.
    vocabulary
        Number of token ids.
    image_tokens
        Tokens of one picture.
    predictor
        ``d_model``, ``nhead``, ``dim_feedforward`` of the image predictor where they are not the paper's.
    """

    shape: DecoderShape
    heads: int
    vocabulary: int
    image_tokens: int
    predictor: dict[str, Any] = field(default_factory=dict)


def _preset(layers: int, hidden: int, intermediate: int, heads: int, **more: Any) -> Preset:
    shape = DecoderShape(layers, hidden, intermediate, query_width=hidden, key_width=hidden)
    return Preset(shape, heads, **{"vocabulary": 32064, "image_tokens": 576} | more)


PRESETS = {
    "nano": _preset(
        8, 256, 768, 4, vocabulary=477, image_tokens=144,
        predictor={"d_model": 128, "nhead": 4, "dim_feedforward": 512},
    ),
    "llava-small": _preset(16, 1024, 2752, 16),
    "llava-1.5-7b": _preset(32, 4096, 11008, 32),
    "llava-1.5-13b": _preset(40, 5120, 13824, 40),
}  # fmt: skip


def preset(name: str) -> Preset:
    """Return a preset by name; an unknown one raises ``ValueError`` with the known ones."""
    if name not in PRESETS:
        raise ValueError(f"{name!r} is no preset: choose one of {', '.join(PRESETS)}")
    return PRESETS[name]
