"""Gumbel noise that depends on the seed, the step and the sample, and on nothing else in the batch.

One process and two, one large batch and accumulated small ones, a whole run and a resumed one then sample the
same masks.

Legend: B rows, K pictures, N tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

SMALLEST = 1e-20  # its logarithm is taken


class SampleNoise:
    """Exp(1) noise for a sparsifier, each row or picture from a generator of its own.

    Parameters
    ----------
    seed
        Changes all of it.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.step = 0
        self._keys: list[tuple[bool, list[tuple[int, ...]]]] = []

    def begin(self, rows_B: Sequence[int], pictures_K: Sequence[int], spans: int) -> None:
        """Prepare for one training pass.

        Parameters
        ----------
        rows_B
            Number of each row's sample.
        pictures_K
            The row that each picture belongs to, ascending.
        spans
            For how many kinds of text (output tokens, prompt tokens) noise is drawn, before the image tokens.
        """
        rows = [(sample,) for sample in rows_B]
        pictures = [(rows_B[row], list(pictures_K[:k]).count(row)) for k, row in enumerate(pictures_K)]
        self._keys = [*[(True, rows)] * spans, (False, pictures)]  # type: ignore[list-item]

    def __call__(self, logits: Tensor) -> Tensor:
        """Return noise in the shape of ``logits``, ``[B or K, N, 2]``."""
        kind = len(self._keys)
        is_text, keys = self._keys.pop(0)
        return torch.stack([self._draw((kind, *key), logits[0], is_text) for key in keys])

    def _draw(self, key: tuple[int, ...], like_N2: Tensor, is_text: bool) -> Tensor:
        generator = torch.Generator().manual_seed(hash((self.seed, self.step, *key)) % 2**63)
        uniform_N2 = torch.rand(like_N2.shape, generator=generator)
        if is_text:  # spans are aligned to the right: count from there
            uniform_N2 = uniform_N2.flip(0)
        return (-(-uniform_N2).log1p()).clamp(min=SMALLEST).to(like_N2)
