"""Row lengths and valid slots of a K/V cache, shared by all layers of a stage.

A decoded token is written at slot ``length[row]`` and attends to the valid slots and itself; then the length
grows only if the token is kept, so a dropped token is overwritten by the next.

Legend: B batch, Q new tokens, S slots, N columns of what was fed.
"""

from __future__ import annotations

import torch
from torch import Tensor

BLOCK = 128  # slots that storage grows by where nobody knows how many will come
STEP = 16  # the least that it grows by where a plan falls short
LOOK = 16  # decoded tokens between two looks at the true lengths, each of which waits for the device


class Stage:
    """Storage that grows: in blocks, or to a plan and then in small steps up to a limit.

    Parameters
    ----------
    limit
        Slots a row that storage never has more than; None for no limit.

    Attributes
    ----------
    reserve
        Slots to have from the start.
    length_B
        Next slot of each row, int64.
    valid_BS
        Which slots hold a token; False for padding and for everything from ``length_B`` on.
    column_BS
        Where the token of each slot stood in what was fed, int64.
    used
        Slots that a pass may touch: an upper bound of the lengths that needs no look at the device.
    slots_BQ
        Slots of the new tokens, while a pass is under way.
    contiguous
        Whether these are the last used slots of every row.
    """

    is_static = False

    def __init__(self, limit: int | None = None) -> None:
        self.limit = limit
        self.reserve = limit or 0
        self.length_B = torch.zeros(0, dtype=torch.long)
        self.valid_BS = torch.zeros(0, 0, dtype=torch.bool)
        self.column_BS = torch.zeros(0, 0, dtype=torch.long)
        self.used = 0
        self.slots_BQ: Tensor | None = None
        self.contiguous = True
        self._seen = 0  # `used` when the true lengths were last looked at
        self._even = True  # every row's length is exactly `used`
        self._full = True  # every slot below its row's length is valid

    @property
    def capacity(self) -> int:
        """Slots that storage has."""
        return self.valid_BS.shape[1]

    def tokens_B(self) -> Tensor:
        """Return how many tokens each row holds."""
        return self.valid_BS.sum(-1)

    def holds(self, columns: int) -> Tensor:
        """Return which of the first ``columns`` fed tokens are held: bool ``[B, columns]``."""
        column_BS = self.column_BS.masked_fill(~self.valid_BS, columns)
        held_BN = self.valid_BS.new_zeros(len(column_BS), columns + 1)
        return held_BN.scatter_(1, column_BS, True)[:, :columns]

    def open(self, batch: int, queries: int, valid_BQ: Tensor | None, device: torch.device) -> Tensor | None:
        """Begin a pass of new tokens: make room, and return who sees whom.

        Parameters
        ----------
        batch, queries
            Rows B and new tokens Q of each.
        valid_BQ
            Which of them are tokens and not padding; None where all are.
        device
            Where the keys lie.

        Returns
        -------
        Tensor or None
            Bool ``[B, 1, Q, S]`` over the slots that the layers return; None stands for causal attention in
            an empty cache, or for a single query that sees every slot.
        """
        if self.slots_BQ is not None:
            raise ValueError("an earlier call with this cache failed halfway: reset it or begin a new one")
        if not self.length_B.numel():
            self._begin(batch, device)
        if batch != self.length_B.shape[0]:
            raise ValueError(
                f"past_key_values holds {self.length_B.shape[0]} rows, the call has {batch}: they must agree"
            )
        was_empty = self.used == 0
        self._make_room(queries)
        column_Q = torch.arange(queries, device=device)
        self.slots_BQ = self.length_B[:, None] + column_Q
        if valid_BQ is None and (was_empty or (queries == 1 and self._sees_all)):
            return None
        if valid_BQ is None and queries == 1:
            return self.valid_BS[:, : self.used].scatter(1, self.slots_BQ, True)[:, None, None]
        offset_BS = torch.arange(self.used, device=device) - self.length_B[:, None]
        new_B1S = (offset_BS >= 0)[:, None]
        if valid_BQ is not None:
            new_B1S = new_B1S & valid_BQ.gather(1, offset_BS.clamp(0, queries - 1))[:, None]
        offset_B1S, column_Q1 = offset_BS[:, None], column_Q[:, None]
        visible_BQS = self.valid_BS[:, None, : self.used] | (new_B1S & (offset_B1S <= column_Q1))
        return visible_BQS[:, None]

    def hide(self, seen_BN: Tensor) -> None:
        """Make the slots of fed tokens that a later mask no longer shows invalid; bool ``[B, columns]``."""
        seen_BS = seen_BN.gather(1, self.column_BS.clamp(max=seen_BN.shape[1] - 1))
        if bool((self.valid_BS & ~seen_BS).any()):
            self.valid_BS &= seen_BS
            self._full = False

    def extend(self, valid_BQ: Tensor | None, column_BQ: Tensor) -> None:
        """End a pass whose tokens all stay; padding becomes invalid slots."""
        slots_BQ = self._close()
        self.column_BS.scatter_(1, slots_BQ, column_BQ)
        if valid_BQ is None:
            valid_BQ = torch.ones_like(slots_BQ, dtype=torch.bool)
        else:
            self._full = False
        self.valid_BS.scatter_(1, slots_BQ, valid_BQ)
        self.length_B += slots_BQ.shape[1]

    def keep(self, keep_B: Tensor, column_B1: Tensor) -> None:
        """End a pass of one token a row; where it is not kept, the next one takes its slot."""
        slots_B1 = self._close()
        self.column_BS.scatter_(1, slots_B1, column_B1)
        self.valid_BS.scatter_(1, slots_B1, keep_B[:, None])
        self.length_B += keep_B
        self._even = False

    def place(self, slots_B1: Tensor, column_B1: Tensor, is_held_B: Tensor) -> None:
        """Note that the newest token lies at ``slots_B1``, where another one was, if it is held at all."""
        self.column_BS.scatter_(1, slots_B1, column_B1)
        self.valid_BS.scatter_(1, slots_B1, is_held_B[:, None])

    def select_rows(self, index: Tensor) -> None:
        """Take rows by index, for beam search."""
        with torch.inference_mode(False):  # as in `_begin`
            self.length_B, self.valid_BS = self.length_B[index], self.valid_BS[index]
            self.column_BS = self.column_BS[index]

    @property
    def _sees_all(self) -> bool:
        return self._even and self._full

    def _begin(self, batch: int, device: torch.device) -> None:
        with torch.inference_mode(False):  # a cache filled in inference mode may be continued outside of it
            self.length_B = torch.zeros(batch, dtype=torch.long, device=device)
            self.valid_BS = torch.zeros(batch, 0, dtype=torch.bool, device=device)
            self.column_BS = torch.zeros(batch, 0, dtype=torch.long, device=device)

    def _close(self) -> Tensor:
        if self.slots_BQ is None:
            raise ValueError(
                "the cache was used outside of a pass of the model that its sparsifier is attached to"
            )
        slots_BQ, self.slots_BQ = self.slots_BQ, None
        return slots_BQ

    def _make_room(self, queries: int) -> None:
        is_short = self.used + queries > self.capacity
        if not self._even and (is_short or self.used >= self._seen + LOOK):
            self.used = self._seen = int(self.length_B.max())
        self._check(self.used + queries)
        self.used += queries
        self.contiguous = self._even
        if self.used > self.capacity:
            self._grow()

    def _check(self, tokens: int) -> None:
        if self.limit is not None and tokens > self.limit:
            raise ValueError(
                f"the cache is full: it has room for {self.limit} tokens a row, now there would be {tokens}; "
                "give it a greater capacity"
            )

    def _grow(self) -> None:
        step = BLOCK if self.limit is None else max(STEP, self.limit // 64)
        slots = max(self.reserve, -(-self.used // step) * step)
        more = (0, (slots if self.limit is None else min(slots, self.limit)) - self.capacity)
        with torch.inference_mode(False):  # as in `_begin`
            self.valid_BS = torch.nn.functional.pad(self.valid_BS, more)
            self.column_BS = torch.nn.functional.pad(self.column_BS, more)


class StaticStage(Stage):
    """Storage of one size: after the first pass, every pass attends to all slots, under a mask.

    No shape and no number on the host changes from one decoded token to the next, so the step compiles as one
    graph and can be captured in a CUDA graph.
    """

    is_static = True

    @property
    def _sees_all(self) -> bool:
        return False

    def _make_room(self, queries: int) -> None:
        self.contiguous = self.used == 0
        if not self.contiguous:
            if queries > 1:  # a decoded token needs no look: past the last slot, torch refuses to write
                self._check(int(self.length_B.max()) + queries)
            self.used = self.capacity
            return
        self._check(queries)
        self.used = queries
        self._grow()
        keep_address(self.length_B, self.valid_BS, self.column_BS)


def keep_address(*tensors: Tensor) -> None:
    """Promise that tensors stay where they are, without which CUDA graphs copy them at every step.

    Where the first pass is compiled itself, the promise cannot be made.
    """
    if not torch.compiler.is_compiling():
        for tensor in tensors:
            torch._dynamo.mark_static_address(tensor)
