"""Which token each slot of the sparse layers holds.

A decoded token is written at slot ``length[row]`` and attends to the valid slots and itself; then the length
grows only if the token is kept, so a dropped token is overwritten by the next.

Legend: B batch, Q new tokens, S slots, N columns of what was fed.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

BLOCK = 128  # slots that storage grows by where nobody knows how many will come
STEP = 16  # the least that it grows by where a plan falls short
LOOK = 16  # decoded tokens between two looks at the true lengths, each of which waits for the device


class Slots:
    """Slots that grow: in blocks, or to a plan and then in small steps up to a limit.

    Parameters
    ----------
    limit
        Slots a row that there are never more than; None for no limit.

    Attributes
    ----------
    reserve
        Slots to have from the start.
    fed
        Columns fed so far, padding included; a tensor if static, so that a compiled step may count.
    answer_start
        Column of the turn's first output token, int64 ``[1]``.
    length_B
        Next slot of each row, int64.
    valid_BS
        Which slots hold a token; False for padding and for everything from ``length_B`` on.
    column_BS
        Where the token of each slot stood in what was fed, int64.
    used
        Slots that a pass may touch: an upper bound of the lengths that needs no look at the device.
    slots_BQ
        Slots of the new tokens, while they are written.
    contiguous
        Whether these are the last used slots of every row.
    decoded
        Ids of the decoded tokens, with the column of the first, in parts ``[B, T]``: for reports.
    padding
        What was fed that is no token: a first column, and which columns from there on are tokens, bool.
    is_even, is_full
        Whether every row's length is exactly ``used``, and every slot below its row's length valid.
    """

    is_static = False
    columns: int | None = None  # that may be fed in all, where the cache is static

    def __init__(self, limit: int | None = None) -> None:
        self.limit = limit
        self.reserve = limit or 0
        self.fed: Any = 0
        self.length_B = self.answer_start = torch.zeros(0, dtype=torch.long)
        self.valid_BS = torch.zeros(0, 0, dtype=torch.bool)
        self.column_BS = torch.zeros(0, 0, dtype=torch.long)
        self.used = 0
        self.slots_BQ: Tensor | None = None
        self.contiguous = True
        self._places: tuple[int, Tensor] | None = None  # of the new tokens, which all layers share
        self._firsts: tuple[tuple[int, ...], Tensor] | None = None  # of slot 0 in each row and head
        self.padding: list[tuple[int, Tensor]] = []
        self.decoded: list[tuple[int, Tensor]] = []
        self.is_even = self.is_full = True
        self.looked = 0  # `used` when the true lengths were last looked at

    @property
    def capacity(self) -> int:
        """Slots that storage has."""
        return self.valid_BS.shape[1]

    @property
    def sees_all(self) -> bool:
        """Whether every row uses all used slots, and all of them hold tokens."""
        return self.is_even and self.is_full

    def tokens_B(self) -> Tensor:
        """Return how many tokens each row holds."""
        return self.valid_BS.sum(-1)

    def is_token_BN(self, columns: int) -> Tensor:
        """Return which of ``columns`` columns, later ones included, are no padding: bool ``[B, columns]``."""
        size = (len(self.length_B), columns)
        is_token_BN = torch.ones(size, dtype=torch.bool, device=self.length_B.device)
        for start, token_BN in self.padding:
            is_token_BN[:, start : start + token_BN.shape[1]] &= token_BN
        return is_token_BN

    def open(self, column_BQ: Tensor) -> None:
        """Make room for new tokens, and write down their columns."""
        batch, queries = column_BQ.shape
        if not self.length_B.numel():
            self._begin(batch, column_BQ.device)
        self._make_room(queries)
        self._places = None
        self.slots_BQ = self.length_B[:, None]
        if queries > 1:
            self.slots_BQ = self.slots_BQ + torch.arange(queries, device=column_BQ.device)
        self.column_BS.scatter_(1, self.slots_BQ, column_BQ)

    def places(self, heads: int) -> Tensor:
        """Return where the new tokens lie in storage ``[B, H, S, D]`` seen as rows of D: ``[B * H * Q]``."""
        if self._places is None or self._places[0] != heads:
            slots_BQ = self._opened()
            key = (heads, len(slots_BQ), self.capacity)
            if self._firsts is None or self._firsts[0] != key:
                first = torch.arange(len(slots_BQ) * heads, device=slots_BQ.device) * self.capacity
                self._firsts = (key, first.view(-1, heads, 1))
            self._places = (heads, (self._firsts[1] + slots_BQ[:, None]).flatten())
        return self._places[1]

    def seen(self, valid_BQ: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return the column of each used slot, and whether a token is there, new ones too: ``[B, S]``."""
        valid_BS, slots_BQ = self.valid_BS[:, : self.used], self._opened()
        new = (
            valid_BS.scatter(1, slots_BQ, True)
            if valid_BQ is None
            else valid_BS.scatter(1, slots_BQ, valid_BQ)
        )
        return self.column_BS[:, : self.used], new

    def extend(self, valid_BQ: Tensor | None) -> None:
        """End a pass whose tokens all stay; padding becomes invalid slots."""
        slots_BQ = self._close()
        if valid_BQ is None:
            self.valid_BS.scatter_(1, slots_BQ, True)
        else:
            self.valid_BS.scatter_(1, slots_BQ, valid_BQ)
            self.is_full = False
        self.length_B += slots_BQ.shape[1]

    def keep(self, keep_B: Tensor) -> None:
        """End a pass of one token a row; where it is not kept, the next one takes its slot."""
        slots_B1 = self._close()
        self.valid_BS.scatter_(1, slots_B1, keep_B[:, None])
        self.length_B += keep_B
        self.is_even = False

    def count(self, columns: int, is_token_BN: Tensor | None = None) -> None:
        """Note that ``columns`` more were fed, and which of them are tokens; None where all are."""
        if is_token_BN is not None:
            self.padding.append((int(self.fed), is_token_BN))
        self.fed += columns

    def note(self, ids_B1: Tensor | None) -> None:
        """Keep the ids of decoded tokens, where several rows may end one after the other."""
        if ids_B1 is not None and len(ids_B1) > 1:
            self.decoded.append((self.fed, ids_B1))

    def ids_BT(self, start: int, stop: int) -> Tensor | None:
        """Return the ids decoded in these columns, ``[B, T]``; None where they were not kept."""
        parts = [ids for first, ids in self.decoded if start <= first < stop]
        return torch.cat(parts, 1) if sum(part.shape[1] for part in parts) == stop - start > 0 else None

    def select_rows(self, index: Tensor) -> None:
        """Take rows by index, for beam search."""
        self.decoded = [(first, ids_BT[index]) for first, ids_BT in self._joined()]
        with torch.inference_mode(False):  # as in `_begin`
            self.length_B, self.valid_BS = self.length_B[index], self.valid_BS[index]
            self.column_BS = self.column_BS[index]
            self.padding = [(start, token_BN[index]) for start, token_BN in self.padding]

    def _joined(self) -> list[tuple[int, Tensor]]:
        """Return the ids decoded one after the other in one part, so that reordering stays cheap."""
        parts: list[tuple[int, list[Tensor]]] = []
        for first, ids_BT in self.decoded:
            if parts and first == parts[-1][0] + sum(part.shape[1] for part in parts[-1][1]):
                parts[-1][1].append(ids_BT)
            else:
                parts.append((first, [ids_BT]))
        return [(first, torch.cat(ids, 1)) for first, ids in parts]

    def _begin(self, batch: int, device: torch.device) -> None:
        with torch.inference_mode(False):  # a cache filled in inference mode may be continued outside of it
            self.length_B = torch.zeros(batch, dtype=torch.long, device=device)
            self.answer_start = torch.zeros(1, dtype=torch.long, device=device)
            self.valid_BS = torch.zeros(batch, 0, dtype=torch.bool, device=device)
            self.column_BS = torch.zeros(batch, 0, dtype=torch.long, device=device)

    def _opened(self) -> Tensor:
        if self.slots_BQ is None:
            raise ValueError(
                "the cache was used outside of a pass of the model that its sparsifier is attached to"
            )
        return self.slots_BQ

    def _close(self) -> Tensor:
        slots_BQ, self.slots_BQ = self._opened(), None
        return slots_BQ

    def _make_room(self, queries: int) -> None:
        is_short = self.used + queries > self.capacity
        if not self.is_even and (is_short or self.used >= self.looked + LOOK):
            self.used = self.looked = int(self.length_B.max())
        check_room(self.used + queries, self.limit)
        self.used += queries
        self.contiguous = self.is_even
        if self.used > self.capacity:
            self._grow()

    def _grow(self) -> None:
        more = (0, size_for(self.used, self.reserve, self.limit) - self.capacity)
        with torch.inference_mode(False):  # as in `_begin`
            self.valid_BS = torch.nn.functional.pad(self.valid_BS, more)
            self.column_BS = torch.nn.functional.pad(self.column_BS, more)


def check_room(tokens: int, limit: int | None) -> None:
    """Raise ``ValueError`` if ``tokens`` are more than a cache has room for."""
    if limit is not None and tokens > limit:
        raise ValueError(
            f"the cache is full: it has room for {limit} tokens a row, now there would be {tokens}; "
            "give it a greater capacity"
        )


def size_for(used: int, reserve: int, limit: int | None) -> int:
    """Return how many slots storage gets that must have ``used``: to a plan, then in steps, up to a limit."""
    step = BLOCK if limit is None else max(STEP, limit // 64)
    slots = max(reserve, -(-used // step) * step)
    return slots if limit is None else min(slots, limit)
