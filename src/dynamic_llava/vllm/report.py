"""What a worker tells the scheduler after a pass; it goes from process to process with the pass's output."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Report:
    """How many slots each request holds after how many tokens.

    Attributes
    ----------
    held
        Slots by request; a GPU may still be writing them until the pass's output is there.
    """

    names: list[str]
    tokens: list[int]
    held: NDArray[np.int32]

    def __iter__(self) -> Iterator[tuple[str, int, int]]:
        yield from zip(self.names, self.tokens, self.held.tolist(), strict=True)
