"""What was kept, token by token, of requests that ask to be told: the worker notes it, and tells when asked.

Legend: N tokens of the batch.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from dynamic_llava.vllm.batch import Batch, Request

REMEMBERED = 64
"""Requests that are remembered; those that ended included."""


@dataclass
class Noted:
    """One request, and which of its tokens stay: of each pass, its first token, and a flag for each token."""

    request: Request
    passes: list[tuple[int, Tensor]] = field(default_factory=list)

    def flags(self) -> list[bool]:
        """Return a flag for each token so far."""
        return torch.cat([flags for _, flags in self.passes]).tolist() if self.passes else []


class Kept:
    """Notes of the last requests that asked to be told.

    Parameters
    ----------
    remembered
        How many at most.
    """

    def __init__(self, remembered: int = REMEMBERED) -> None:
        self._remembered = remembered
        self._noted: OrderedDict[str, Noted] = OrderedDict()

    def note(self, batch: Batch, starts: Sequence[int], stays_N: Tensor) -> None:
        """Note a pass; nothing is asked of the device.

        Parameters
        ----------
        starts
            Where each row begins in the batch, one more at the end.
        stays_N
            Which tokens stay held.
        """
        for request, done, start, end in zip(batch.requests, batch.done, starts, starts[1:], strict=False):
            if request.explains:
                self._of(request, done).passes.append((done, stays_N[start:end].clone()))

    def _of(self, request: Request, done: int) -> Noted:
        """Return the notes of a request, without those of passes that are computed anew."""
        noted = self._noted.setdefault(request.name, Noted(request))
        noted.passes = [(first, flags) for first, flags in noted.passes if first < done]
        self._noted.move_to_end(request.name)
        while len(self._noted) > self._remembered:
            self._noted.popitem(last=False)
        return noted

    def tell(self, name: str, token_bytes: tuple[int, int]) -> dict[str, Any] | None:
        """Return what was kept of a request.

        Parameters
        ----------
        name
            What its client calls it; vLLM adds a dash and letters of its own.
        token_bytes
            K/V bytes of a token in all dense layers, and in all sparse ones.

        Returns
        -------
        dict or None
            The numbers of :func:`summary`, ``pictures`` and ``output_kept``; None where the request did not
            ask to be told, or was forgotten.
        """
        found = [noted for full, noted in self._noted.items() if name in (full, full.rpartition("-")[0])]
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
