"""What the model must know of the requests in a batch, and where their slots are counted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from dynamic_llava.vllm.book import Span
from dynamic_llava.vllm.rates import Rates


@dataclass(frozen=True)
class Request:
    """What stays the same of a request while it is served.

    Attributes
    ----------
    prompt
        Tokens of its prompt; those after it are output tokens, also when they are computed anew.
    pictures
        Where the image tokens of each picture lie.
    explains
        Whether its client wants to be told which tokens were kept.
    """

    name: str
    prompt: int
    pictures: Sequence[Span]
    rates: Rates
    explains: bool = False


@dataclass(frozen=True)
class Batch:
    """The requests of one pass, in the order of its rows.

    Attributes
    ----------
    done
        Tokens of each request that earlier passes computed.
    index_R
        Where each request's count of held slots stands, int64 ``[R]``; it never moves.
    """

    requests: Sequence[Request]
    done: Sequence[int]
    index_R: Tensor


class Batches(Protocol):
    """Gives the batch of the pass that runs now."""

    def now(self) -> Batch | None:
        """Return the batch; None where it is a dummy one, that only warms up."""
