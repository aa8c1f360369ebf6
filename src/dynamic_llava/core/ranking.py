"""The attention that the last prompt token pays to image tokens, for methods that rank by it.

Legend: B batch, I image tokens, N tokens fed, C channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor

from dynamic_llava.core.attention.probe import Probe
from dynamic_llava.core.masks import seen_by


class Ranking:
    """A look at the last dense layer.

    Parameters
    ----------
    mask
        The stock mask of that layer.
    prompt_BN
        Which of the tokens fed belong to the prompt, bool.
    past
        Columns fed before.
    pictures
        Where the tokens of each picture lie in the flattened ``[B * N]`` input, int64 ``[I]`` each.
    """

    def __init__(self, mask: Any, prompt_BN: Tensor, past: int, pictures: Sequence[Tensor]) -> None:
        self._length = prompt_BN.shape[1]
        self._past, self._pictures = past, pictures
        last_B = (torch.arange(self._length, device=prompt_BN.device) * prompt_BN).amax(-1)
        self.probe = Probe(last_B, seen_by(mask, last_B, self._length))

    def of_pictures(self) -> list[Tensor]:
        """Return the attention to the tokens of each picture, ``[I]``, once the layer ran."""
        weights_BS = cast(Tensor, self.probe.weights_BS)
        weights = weights_BS[:, self._past : self._past + self._length].flatten()
        return [weights[picture_I] for picture_I in self._pictures]
