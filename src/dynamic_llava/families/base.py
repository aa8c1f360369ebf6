"""What a family of models must answer: where its decoder is, and which tokens are those of which picture.

Legend: B batch, N tokens, I image tokens of a picture, C channels.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Sizes = Callable[[Any, Mapping[str, Any], Any, Tensor], Sequence[int]]


@dataclass(frozen=True)
class Kind:
    """A kind of picture that a family takes: images, or videos.

    Parameters
    ----------
    sizes
        Returns how many tokens each picture has, in the order of the rows. Called with the base model, with
        what it was called with, by name, with the entry of ``mm_encoder_outputs`` (None where it encodes the
        pictures itself), and with the bool ``[B, N]`` of their tokens.
    token
        Attribute of the config with the id of their token.
    pixels
        The keyword that brings them.
    modality
        Their entry in ``mm_encoder_outputs``, what ``generate`` encodes before it calls the model.
    """

    sizes: Sizes
    token: str = "image_token_id"
    pixels: str = "pixel_values"
    modality: str = "image"

    def find(self, base: Any, given: Mapping[str, Any]) -> list[Tensor]:
        """Return where the tokens of each picture lie, see :meth:`Family.pictures`."""
        encoded = (given.get("mm_encoder_outputs") or {}).get(self.modality)
        mask_BN = self._mask(base, given)
        places = mask_BN.flatten().nonzero()[:, 0]
        if encoded is None and given.get(self.pixels) is None:
            if len(places):
                raise ValueError(
                    f"the prompts hold {len(places)} {self.modality} tokens, and no picture came with them: "
                    f"give {self.pixels} (older versions of transformers drop them under prefill_chunk_size)"
                )
            return []
        sizes = list(self.sizes(base, given, encoded, mask_BN))
        if sum(sizes) != len(places) or 0 in sizes:
            raise ValueError(
                f"the prompts hold {len(places)} {self.modality} tokens for {len(sizes)} pictures of "
                f"{sum(sizes)}: give each picture one image placeholder"
            )
        pictures = list(places.split(sizes))
        row_K = [int(picture_I[0]) // mask_BN.shape[1] for picture_I in pictures]
        for picture_I, row in zip(pictures, row_K, strict=True):
            if int(picture_I[-1]) // mask_BN.shape[1] != row:
                raise ValueError(
                    f"a picture's {len(picture_I)} image tokens lie in more than one row: "
                    "give each picture one image placeholder in its own row"
                )
        return pictures

    def _mask(self, base: Any, given: Mapping[str, Any]) -> Tensor:
        token, ids_BN = getattr(base.config, self.token), given.get("input_ids")
        if isinstance(ids_BN, Tensor):
            return ids_BN == token
        embeds_BNC = given["inputs_embeds"]
        embedding_C = base.get_input_embeddings()(torch.tensor(token, device=embeds_BNC.device))
        return (embeds_BNC == embedding_C).all(-1)


def _second(config: Any) -> int:
    """Return 1: decisions fall on what layer 0 returns at the earliest."""
    return 1


@dataclass(frozen=True)
class Family:
    """Facts about a family of models.

    Parameters
    ----------
    decoder
        Path of the decoder within the base model; empty where it is the base model.
    kinds
        The kinds of pictures that it takes; none for a model of text alone.
    first_layer
        Called with the model's config, returns the lowest layer l that may drop tokens.
    tower, projectors
        Paths of what makes features of pictures and of what projects them, which recipes train or freeze.
    """

    decoder: str = "language_model"
    kinds: tuple[Kind, ...] = ()
    first_layer: Callable[[Any], int] = _second
    tower: str = "vision_tower"
    projectors: tuple[str, ...] = ("multi_modal_projector",)

    def pictures(self, base: Any, given: Mapping[str, Any]) -> list[Tensor]:
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
            If image tokens and pictures do not agree, or a picture lies in more than one row.
        """
        ids_BN = given.get("input_ids")
        if ids_BN is not None and ids_BN.shape[1] == 1 and not self.has_pictures(given):
            return []  # first, for every decoded token comes by
        found = [picture_I for kind in self.kinds for picture_I in kind.find(base, given)]
        return found if len(self.kinds) < 2 else sorted(found, key=lambda picture_I: int(picture_I[0]))

    def check_layer(self, config: Any, layer: int, layers: int) -> None:
        """Raise ``ValueError`` if a decoder of so many layers cannot be sparse from ``layer`` on."""
        first = self.first_layer(config)
        if first <= layer < layers:
            return
        why = f"the decoder has {layers} layers"
        if layer < first:
            why = f"this model adds features of its pictures to the first {first} layers"
        raise ValueError(f"layer is {layer}: {why}, choose {first} to {layers - 1}")

    def has_pictures(self, given: Mapping[str, Any]) -> bool:
        """Return whether a call of the base model brings pictures."""
        if given.get("mm_encoder_outputs") is not None:
            return True
        return any(given.get(kind.pixels) is not None for kind in self.kinds)


TEXT = Family(decoder="")
