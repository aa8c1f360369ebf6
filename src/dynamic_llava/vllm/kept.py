"""What was kept, token by token, of requests that ask to be told: the worker notes it, and tells when asked.

Legend: N tokens of the batch.
"""

from __future__ import annotations

import math
import re
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from dynamic_llava.vllm.batch import Batch, Request

REMEMBERED = 64
"""Requests that are remembered; those that ended included."""

ROOM = 1024
"""Tokens that the notes of a request have room for at first."""


RANDOM = re.compile(r"-[0-9a-f]{8}$")
"""What vLLM adds to a client's name of a request."""


@dataclass
class Noted:
    """One request, and which of its first tokens stay; ``room_T`` has room for more."""

    request: Request
    room_T: Tensor
    tokens: int = 0

    def note(self, done: int, stays_N: Tensor) -> None:
        """Note a pass over the tokens from ``done`` on; what is computed anew replaces what was."""
        self.tokens = done + len(stays_N)
        if self.tokens > len(self.room_T):
            self.room_T = F.pad(self.room_T, (0, self.tokens))
        self.room_T[done : self.tokens] = stays_N

    def flags(self) -> list[bool]:
        """Return a flag for each token so far."""
        found: list[bool] = self.room_T[: self.tokens].tolist()
        return found


class Kept:
    """Notes of the last requests that asked to be told.

    Parameters
    ----------
    remembered
        How many at most; of requests that are pushed out while they run nothing is known any more.
    """

    def __init__(self, remembered: int = REMEMBERED) -> None:
        self._remembered = remembered
        self._noted: OrderedDict[str, Noted] = OrderedDict()

    def note(self, batch: Batch, begin: Tensor, stays_N: Tensor) -> None:
        """Note a pass; nothing is asked of the device.

        Parameters
        ----------
        begin
            Where each row begins in the batch, one more at the end; on the host.
        stays_N
            Which tokens stay held, bool.
        """
        asked = [row for row, request in enumerate(batch.requests) if request.explains]
        for row in asked:
            request, done = batch.requests[row], batch.done[row]
            if not done:
                self._open(request, stays_N.device)
            if request.name in self._noted:
                self._noted[request.name].note(done, stays_N[int(begin[row]) : int(begin[row + 1])])

    def _open(self, request: Request, device: torch.device) -> None:
        """Begin the notes of a request, or begin them anew."""
        room_T = torch.empty(ROOM, dtype=torch.bool, device=device)
        self._noted[request.name] = Noted(request, room_T)
        self._noted.move_to_end(request.name)
        if len(self._noted) > self._remembered:
            self._noted.popitem(last=False)

    def tell(self, name: str, token_bytes: tuple[int, int]) -> dict[str, Any] | None:
        """Return what was kept of a request.

        Parameters
        ----------
        name
            The id of a chat or a completion, as its client got it; vLLM adds to both.
        token_bytes
            K/V bytes of a token in all dense layers, and in all sparse ones.

        Returns
        -------
        dict or None
            The numbers of :func:`summary`, ``pictures`` and ``output_kept``; None where the request did not
            ask to be told, or was forgotten.
        """
        names = (name, f"{name}-0")  # the first prompt of a completion
        found = [noted for full, noted in self._noted.items() if RANDOM.sub("", full) in names]
        if not found:
            return None
        request, flags = found[-1].request, found[-1].flags()
        pictures = [picture(flags[first : first + count]) for first, count in request.pictures]
        dropped = sum(shown["tokens"] - len(shown["kept"]) for shown in pictures)
        image_tokens = sum(count for _, count in request.pictures)
        numbers: Mapping[str, Any] = summary(
            len(flags), sum(flags), request.prompt, image_tokens, dropped, token_bytes
        )
        return {**numbers, "pictures": pictures, "output_kept": flags[request.prompt :]}


def picture(flags: Sequence[bool]) -> dict[str, Any]:
    """Return what a page needs to draw a picture: the side of its grid, if square, and the kept patches."""
    side = math.isqrt(len(flags))
    return {
        "tokens": len(flags),
        "side": side if side * side == len(flags) else None,
        "kept": [place for place, stays in enumerate(flags) if stays],
    }


def summary(
    tokens: int, held: int, prompt: int, image_tokens: int, dropped: int, token_bytes: tuple[int, int]
) -> dict[str, int]:
    """Return what a request kept, and its K/V bytes on each device, by the names of our reports.

    Parameters
    ----------
    tokens, held
        Tokens computed, and how many of them the sparse layers hold.
    prompt, image_tokens, dropped
        Tokens of the prompt, how many of them are image tokens, and how many of those are dropped.
    token_bytes
        K/V bytes of a token in all dense layers, and in all sparse ones.
    """
    outputs = max(0, tokens - prompt)
    dense, sparse = token_bytes
    return {
        "image_tokens": image_tokens,
        "image_tokens_kept": image_tokens - dropped,
        "output_tokens": outputs,
        "output_tokens_kept": held - prompt + dropped if outputs else 0,
        "kv_bytes": tokens * dense + held * sparse,
        "kv_bytes_dense": tokens * (dense + sparse),
    }
