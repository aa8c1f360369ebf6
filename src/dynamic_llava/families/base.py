"""What a family of models must answer.

Legend: B batch, N tokens, C channels.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Family:
    """Facts about a family of models.

    Parameters
    ----------
    decoder
        Path of the decoder within the base model (``model.base_model``); empty where it is the base model.
    image_token
        Attribute of the config with the id of an image token.
    sizes
        Called with the config, with what the base model was called with, by name, and with the number of
        image tokens that each row holds; returns how many tokens each picture has, in the order of the rows,
        or None in a call without pictures. Raises ``ValueError`` where they do not agree.
    """

    decoder: str
    image_token: str
    sizes: Callable[[Any, Mapping[str, Any], Sequence[int]], Sequence[int] | None]

    def pictures(self, base: nn.Module, given: Mapping[str, Any]) -> list[Tensor]:
        """Return where the tokens of each picture lie in the flattened ``[B * N]`` input: int64, ascending.

        Parameters
        ----------
        base
            The base model, such as ``LlavaModel``: only this level sees both ids and pictures.
        given
            What its ``forward`` was called with, by name.

        Raises
        ------
        ValueError
            If the image tokens cannot be shared by the pictures, or a picture lies in more than one row.
        """
        ids_BN: Tensor | None = given.get("input_ids")
        has_pictures = given.get("pixel_values") is not None or given.get("mm_encoder_outputs") is not None
        if not has_pictures and (ids_BN is None or ids_BN.shape[1] == 1):
            return []  # first, for every decoded token comes by
        mask_BN = self._image_token_mask(base, given)
        places = mask_BN.flatten().nonzero()[:, 0]
        sizes = self.sizes(base.config, given, mask_BN.sum(-1).tolist())
        if sizes is None and len(places):
            raise ValueError(
                f"the prompts hold {len(places)} image tokens, and no picture came with them: give "
                "pixel_values (older versions of transformers drop them under prefill_chunk_size)"
            )
        if sizes is None:
            return []
        pictures = list(places.split(list(sizes)))
        ends_K2 = torch.stack([picture_I[[0, -1]] for picture_I in pictures]) // mask_BN.shape[1]
        for size, is_whole in zip(sizes, (ends_K2[:, 0] == ends_K2[:, 1]).tolist(), strict=True):
            if not is_whole:
                raise ValueError(
                    f"a picture's {size} image tokens lie in more than one row: "
                    "give each picture one image placeholder in its own row"
                )
        return pictures

    def _image_token_mask(self, base: Any, given: Mapping[str, Any]) -> Tensor:
        token = getattr(base.config, self.image_token)
        ids_BN: Tensor | None = given.get("input_ids")
        if ids_BN is not None:
            return ids_BN == token
        embeds_BNC = given["inputs_embeds"]
        embedding_C = base.get_input_embeddings()(torch.tensor(token, device=embeds_BNC.device))
        return (embeds_BNC == embedding_C).all(-1)
