"""What a pass did that costs something.

Legend: B batch.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Step(NamedTuple):
    """A prompt or, without a cache, any pass.

    Its queries in dense and in sparse layers, how many of them the sparse layers hold, and between which
    columns of all that was fed it stood; the sizes of the pictures that it scored, and the number of text
    tokens that it decided on.
    """

    dense_B: Tensor
    sparse_B: Tensor
    held_B: Tensor
    columns: tuple[int, int]
    scored: tuple[int, ...] = ()
    judged: int = 0

    def select_rows(self, index: Tensor) -> Step:
        """Take rows by index."""
        rows = {name: getattr(self, name)[index] for name in ("dense_B", "sparse_B", "held_B")}
        return self._replace(**rows)
