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
        Attention heads of queries.
    vocabulary
        Number of token ids.
    image_tokens
        Tokens of one picture.
    model_type
        The family that it is of.
    predictor
        ``d_model``, ``nhead``, ``dim_feedforward`` of the image predictor where they are not the paper's.
    """

    shape: DecoderShape
    heads: int
    vocabulary: int
    image_tokens: int
    model_type: str = "llava"
    predictor: dict[str, Any] = field(default_factory=dict)


def _preset(
    layers: int, hidden: int, intermediate: int, heads: int, key_width: int | None = None, **more: Any
) -> Preset:
    shape = DecoderShape(layers, hidden, intermediate, query_width=hidden, key_width=key_width or hidden)
    return Preset(shape, heads, **{"vocabulary": 32064, "image_tokens": 576} | more)


PRESETS = {
    "nano": _preset(
        8, 256, 768, 4, vocabulary=477, image_tokens=144,
        predictor={"d_model": 128, "nhead": 4, "dim_feedforward": 512},
    ),
    "llava-small": _preset(16, 1024, 2752, 16),
    "llava-1.5-7b": _preset(32, 4096, 11008, 32),
    "llava-1.5-13b": _preset(40, 5120, 13824, 40),
    # Decoders as their configs on the hub have them; pictures of a size that is usual for each.
    "llava-onevision-7b": _preset(
        28, 3584, 18944, 28, key_width=512, vocabulary=152000, image_tokens=3699, model_type="llava_onevision"
    ),
    "qwen2.5-vl-7b": _preset(
        28, 3584, 18944, 28, key_width=512, vocabulary=152064, image_tokens=1024, model_type="qwen2_5_vl"
    ),
    "qwen3-vl-8b": _preset(
        36, 4096, 12288, 32, key_width=1024, vocabulary=151936, image_tokens=1024, model_type="qwen3_vl"
    ),
    "internvl3-8b": _preset(
        28, 3584, 18944, 28, key_width=512, vocabulary=151674, image_tokens=1792, model_type="internvl"
    ),
}  # fmt: skip


def preset(name: str) -> Preset:
    """Return a preset by name; an unknown one raises ``ValueError`` with the known ones."""
    if name not in PRESETS:
        raise ValueError(f"{name!r} is no preset: choose one of {', '.join(PRESETS)}")
    return PRESETS[name]
