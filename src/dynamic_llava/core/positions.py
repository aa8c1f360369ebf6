"""Where the tokens of pictures lie, in a call that brings them as embeddings.

Legend: B batch, N tokens fed, I image tokens.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from dynamic_llava.core.decisions import Decisions

UNSEEN = (
    "inputs_embeds came without input_ids or image_positions: image tokens cannot be told from text, so none "
    "of them is dropped. Give image_positions, for each row a list of LongTensors, the positions of each "
    "picture's tokens (an empty list where there is none): to the model, or for generate() to "
    "past_key_values=sparsifier.new_cache(image_positions=...)"
)


class Embedded:
    """Calls that bring a prompt as embeddings, which may hold the features of pictures.

    Parameters
    ----------
    decisions
        Whose config says whether image tokens are dropped.
    has_pictures
        Whether the model takes pictures at all.
    """

    def __init__(self, decisions: Decisions, has_pictures: bool) -> None:
        self.decisions, self.has_pictures = decisions, has_pictures
        self._has_warned = False

    def pictures(self, kwargs: Mapping[str, Any], positions: Any) -> list[Tensor]:
        """Return where the caller says that pictures lie; warn once where it does not and some may.

        See :func:`flat` for ``positions``.
        """
        ids_BN, embeds_BNC = kwargs.get("input_ids"), kwargs.get("inputs_embeds")
        fed = embeds_BNC if ids_BN is None else ids_BN
        if positions is not None and isinstance(fed, Tensor):
            return flat(positions, fed.shape[0], fed.shape[1], fed.device)
        may_hold = isinstance(embeds_BNC, Tensor) and embeds_BNC.shape[1] > 1 and self.has_pictures
        if may_hold and self.decisions.config.sparsify_image and not self._has_warned:
            self._has_warned = True
            warnings.warn(UNSEEN, stacklevel=2)
        return []


def flat(positions: Sequence[Sequence[Any]], batch: int, length: int, device: torch.device) -> list[Tensor]:
    """Return where the tokens of each picture lie in the flattened ``[B * N]`` input: int64, ascending.

    Parameters
    ----------
    positions
        For each row, of each picture the positions of its tokens in the row, ascending. Fewer rows than the
        call has are repeated, each as often, as ``generate`` repeats rows for beams.
    batch, length
        B and N.
    device
        Where the call computes.

    Raises
    ------
    ValueError
        If they do not fit the call.
    """
    if not positions or batch % len(positions):
        raise ValueError(f"image_positions has {len(positions)} rows, the call has {batch}")
    times, pictures = batch // len(positions), []
    for row in range(batch):
        seen: set[int] = set()
        for number, given in enumerate(positions[row // times]):
            picture_I = torch.as_tensor(given, device=device)
            found = picture_I.flatten().tolist()
            is_list = picture_I.ndim == 1 and not picture_I.is_floating_point()
            if not is_list or not found or sorted(set(found)) != found:
                raise ValueError(
                    f"image_positions, row {row}, picture {number}: it must be a LongTensor of one "
                    "dimension, ascending and not empty"
                )
            if found[0] < 0 or found[-1] >= length or seen & set(found):
                raise ValueError(
                    f"image_positions, row {row}, picture {number}: its positions must lie in 0 to "
                    f"{length - 1}, and no other picture may have them"
                )
            seen |= set(found)
            pictures.append(picture_I.long() + row * length)
    return pictures
