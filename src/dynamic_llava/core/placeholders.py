"""Where the tokens of each picture lie in a prompt, and where its last question.

Legend: B batch, N tokens, K pictures, I image tokens, C channels.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def image_positions(module: nn.Module, given: dict[str, Any]) -> Tensor | None:
    """Find the image tokens of a call of the multimodal model; only this level sees both ids and pictures.

    Parameters
    ----------
    module
        The multimodal model, such as ``LlavaModel``.
    given
        What its ``forward`` was called with, by name.

    Returns
    -------
    Tensor or None
        int64 ``[K, I]``, positions in the flattened ``[B * N]`` input; None in a call without pictures.

    Raises
    ------
    ValueError
        If the image tokens cannot be shared evenly by the pictures.
    """
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


def question_mask(
    token_ids_BN: Tensor | None, image_positions_KI: Tensor | None, valid_BN: Tensor, marker: tuple[int, ...]
) -> Tensor:
    """Find the prompt tokens that may be dropped: the last question, all but its last token.

    It starts with the last ``marker`` after the row's pictures, or right after them where there is none (the
    official ``last_instruct`` span); a row without pictures has none.

    Parameters
    ----------
    token_ids_BN
        None where the prompt was given as embeddings: then no marker is looked for.
    image_positions_KI
        See :func:`image_positions`.
    valid_BN
        Which tokens belong to the prompt: no padding, no answer.
    marker
        Token ids; may be empty.

    Returns
    -------
    Tensor
        Bool ``[B, N]``.
    """
    batch, length = valid_BN.shape
    column_N = torch.arange(length, device=valid_BN.device)
    if image_positions_KI is None:
        return torch.zeros_like(valid_BN)
    row_K, column_K = image_positions_KI[:, -1] // length, image_positions_KI[:, -1] % length
    start_B = torch.full((batch,), length, device=valid_BN.device)
    start_B = start_B.scatter_reduce(0, row_K, column_K + 1, "amax", include_self=False)
    if token_ids_BN is not None and 0 < len(marker) <= length:
        wanted = torch.tensor(marker, device=valid_BN.device)
        found_BM = (token_ids_BN.unfold(1, len(marker), 1) == wanted).all(-1)
        found_BM &= valid_BN.unfold(1, len(marker), 1).all(-1)
        found_BM &= column_N[: found_BM.shape[1]] >= start_B[:, None]
        last_B = torch.where(found_BM, column_N[: found_BM.shape[1]], -1).amax(-1)
        start_B = torch.where(last_B >= 0, last_B, start_B)
    return but_last(valid_BN & (column_N >= start_B[:, None]), valid_BN)


def but_last(mask_BN: Tensor, valid_BN: Tensor) -> Tensor:
    """Take the last token of each row out of a mask."""
    column_N = torch.arange(valid_BN.shape[1], device=valid_BN.device)
    last_B1 = torch.where(valid_BN, column_N, -1).amax(-1, keepdim=True)
    return mask_BN & (column_N != last_B1)


def _image_token_mask(module: Any, given: dict[str, Any]) -> Tensor:
    token = module.config.image_token_id
    if given.get("input_ids") is not None:
        return given["input_ids"] == token
    embeds_BNC = given["inputs_embeds"]
    embedding_C = module.get_input_embeddings()(torch.tensor(token, device=embeds_BNC.device))
    return (embeds_BNC == embedding_C).all(-1)
