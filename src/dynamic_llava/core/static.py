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

    @property
    def sees_all(self) -> bool:
        """False: what is not used yet must be hidden."""
        return False

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
        keep_address(self.length_B, self.answer_start, self.valid_BS, self.column_BS, self.fed)


def keep_address(*tensors: Tensor) -> None:
    """Promise that tensors stay where they are, without which CUDA graphs copy them at every step.

    Where the first pass is compiled itself, the promise cannot be made.
    """
    if not torch.compiler.is_compiling():
        for tensor in tensors:
            torch._dynamo.mark_static_address(tensor)
