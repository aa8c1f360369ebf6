"""Where the tokens of each picture lie in a prompt.

Legend: B batch, N tokens, K pictures, I image tokens, C channels.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn


def image_positions(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """Find the image tokens of a call of the multimodal model; only this level sees both ids and pictures.

    Parameters
    ----------
    module
        The multimodal model, such as ``LlavaModel``.
    args, kwargs
        What its ``forward`` was called with.

    Returns
    -------
    Tensor or None
        int64 ``[K, I]``, positions in the flattened ``[B * N]`` input; None in a call without pictures.

    Raises
    ------
    ValueError
        If the image tokens cannot be shared evenly by the pictures.
    """
    given = inspect.signature(module.forward).bind_partial(*args, **kwargs).arguments
    encoded: Any = (given.get("mm_encoder_outputs") or {}).get("image")
    pixel_values: Any = given.get("pixel_values")
    if encoded is None and pixel_values is None:
        return None
    if given.get("image_sizes") is not None:
        raise ValueError("image_sizes: pictures of different numbers of image tokens are not supported")
    if encoded is not None and encoded.last_hidden_state is None:
        raise ValueError("prefill_chunk_size: parting the image tokens of a picture is not supported")
    pictures = len(pixel_values) if encoded is None else len(encoded.pooler_output)
    mask_BN = _image_token_mask(module, given)
    total = int(mask_BN.sum())
    if total == 0 or total % pictures:
        raise ValueError(
            f"the prompts hold {total} image tokens for {pictures} pictures: "
            "give each picture one image placeholder"
        )
    positions_KI = mask_BN.flatten().nonzero().view(pictures, -1)
    first_K, last_K = (positions_KI[:, place] // mask_BN.shape[1] for place in (0, -1))
    if not torch.equal(first_K, last_K):
        raise ValueError(
            f"a picture's {positions_KI.shape[1]} image tokens lie in more than one row: "
            "give each picture one image placeholder in its own row"
        )
    return positions_KI


def _image_token_mask(module: Any, given: dict[str, Any]) -> Tensor:
    token = module.config.image_token_id
    if given.get("input_ids") is not None:
        return given["input_ids"] == token
    embeds_BNC = given["inputs_embeds"]
    embedding_C = module.get_input_embeddings()(torch.tensor(token, device=embeds_BNC.device))
    return (embeds_BNC == embedding_C).all(-1)
