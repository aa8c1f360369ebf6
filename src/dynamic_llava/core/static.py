"""Slots of a static cache, and the promise that they stay where they are.

Legend: B batch, S slots.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dynamic_llava.core.slots import Slots, check_room


class StaticSlots(Slots):
    """Slots of one size: after the first pass, every pass attends to all of them, under a mask.

    No shape and no number on the host changes from one decoded token to the next, so the step compiles as one
    graph and can be captured in a CUDA graph.
    """

    is_static = True

    def __init__(self, limit: int | None = None) -> None:
        super().__init__(limit)
        self.columns = limit or 0  # of all that may be fed; the limit of slots is planned lower
        self.ids_BN = torch.zeros(0, self.columns, dtype=torch.long)

    @property
    def sees_all(self) -> bool:
        """False: what is not used yet must be hidden."""
        return False

    def note(self, ids_B1: Tensor | None) -> None:
        """Keep the ids of a decoded token at its column."""
        if ids_B1 is not None and len(ids_B1) > 1:
            self.ids_BN.index_copy_(1, self.fed.view(1), ids_B1)

    def ids_BT(self, start: int, stop: int) -> Tensor | None:
        """Return the ids decoded in these columns."""
        return self.ids_BN[:, start:stop]

    def select_rows(self, index: Tensor) -> None:
        """Take rows by index."""
        super().select_rows(index)
        with torch.inference_mode(False):  # as in `_begin`
            self.ids_BN = self.ids_BN[index]

    def _make_room(self, queries: int) -> None:
        self.contiguous = self.used == 0
        if not self.contiguous:
            if queries > 1:  # a decoded token needs no look: past the last slot, torch refuses to write
                check_room(int(self.length_B.max()) + queries, self.limit)
            self.used = self.capacity
            return
        check_room(queries, self.limit)
        self.used = queries
        self._grow()
        with torch.inference_mode(False):  # as in `_begin`
            self.fed = torch.full((), self.fed, dtype=torch.long, device=self.length_B.device)
            self.ids_BN = self.length_B.new_zeros(len(self.length_B), self.columns or 0)
        keep_address(self.length_B, self.answer_start, self.valid_BS, self.column_BS, self.fed, self.ids_BN)


def keep_address(*tensors: Tensor) -> None:
    """Promise that tensors stay where they are, without which CUDA graphs copy them at every step.

    Where the first pass is compiled itself, the promise cannot be made.
    """
    if not torch.compiler.is_compiling():
        for tensor in tensors:
            torch._dynamo.mark_static_address(tensor)
