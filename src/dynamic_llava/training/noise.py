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
        self._draws: list[tuple[bool, Sequence[tuple[int, ...]]]] = []

    def begin(
        self,
        rows_B: Sequence[int],
        pictures_K: Sequence[int],
        spans: int,
        groups: Sequence[Sequence[int]] | None = None,
    ) -> None:
        """Prepare for one training pass.

        Parameters
        ----------
        rows_B
            Number of each row's sample.
        pictures_K
            The row that each picture belongs to, ascending.
        spans
            For how many kinds of text (output tokens, prompt tokens) noise is drawn, before the image tokens.
        groups
            The numbers of the pictures that noise is drawn for together; all at once by default.
        """
        rows = [(sample,) for sample in rows_B]
        pictures = [(rows_B[row], list(pictures_K[:k]).count(row)) for k, row in enumerate(pictures_K)]
        together = [range(len(pictures))] if groups is None else groups
        # The first number parts the kinds, not the draws: these depend on what else is in the batch.
        texts = [(True, [(kind, *row) for row in rows]) for kind in range(spans + 1, 1, -1)]
        images = [(False, [(1, *pictures[number]) for number in group]) for group in together]
        self._draws = [*texts, *images]

    def __call__(self, logits: Tensor) -> Tensor:
        """Return noise in the shape of ``logits``, ``[B or K, N, 2]``."""
        is_text, keys = self._draws.pop(0)
        return torch.stack([self._draw(key, logits[0], is_text) for key in keys])

    def _draw(self, key: tuple[int, ...], like_N2: Tensor, is_text: bool) -> Tensor:
        generator = torch.Generator().manual_seed(hash((self.seed, self.step, *key)) % 2**63)
        uniform_N2 = torch.rand(like_N2.shape, generator=generator)
        if is_text:  # spans are aligned to the right: count from there
            uniform_N2 = uniform_N2.flip(0)
        return (-(-uniform_N2).log1p()).clamp(min=SMALLEST).to(like_N2)
