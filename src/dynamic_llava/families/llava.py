"""LLaVA-1.5: every picture has the same number of image tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from dynamic_llava.families.base import Family


def sizes(config: Any, given: Mapping[str, Any], tokens_B: Sequence[int]) -> list[int] | None:
    """Return the number of image tokens of each picture: an even share of all."""
    encoded = (given.get("mm_encoder_outputs") or {}).get("image")
    if encoded is None and given.get("pixel_values") is None:
        return None
    if given.get("image_sizes") is not None:
        raise ValueError("image_sizes: pictures of different numbers of image tokens are not supported")
    if encoded is not None and encoded.last_hidden_state is None:  # a part of a prompt: prefill_chunk_size
        return _whole(tokens_B, config.image_seq_length)
    tokens = sum(tokens_B)
    pictures = len(given["pixel_values"]) if encoded is None else len(encoded.pooler_output)
    if tokens == 0 or tokens % pictures:
        raise ValueError(
            f"the prompts hold {tokens} image tokens for {pictures} pictures: "
            "give each picture one image placeholder"
        )
    return [tokens // pictures] * pictures


def _whole(tokens_B: Sequence[int], size: int) -> list[int]:
    for tokens in tokens_B:
        if tokens % size:
            raise ValueError(
                f"prefill_chunk_size parts a picture: a chunk holds {tokens} image tokens of a row, and a "
                f"picture has {size}; choose a chunk that ends outside of pictures, or leave it out"
            )
    return [size] * (sum(tokens_B) // size)


FAMILY = Family(decoder="language_model", image_token="image_token_id", sizes=sizes)
