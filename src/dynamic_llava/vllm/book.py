"""The scheduler's book: how many K/V slots of the layers >= l each request needs.

It never knows too little: what the workers have not told yet counts as held. So a late or lost message costs
memory for a while, and never a wrong token.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from dynamic_llava.methods.top_k import keep_count

Span = tuple[int, int]
"""Where the tokens of a picture lie in a prompt: the first one, and how many."""


@dataclass(frozen=True)
class Told:
    """What the workers told of a request: how many of its slots were held after how many tokens."""

    tokens: int
    held: int


@dataclass
class Entry:
    """One request.

    Attributes
    ----------
    drops
        Where each picture ends, and how many of its tokens are dropped.
    told
        The last message; none after a preemption, when everything is computed anew.
    """

    drops: list[tuple[int, int]] = field(default_factory=list)
    told: Told | None = None

    @classmethod
    def of(cls, pictures: list[Span], rate: float) -> Entry:
        """Open the entry of a request with these pictures."""
        return cls([(first + count, count - keep_count(count, rate)) for first, count in pictures])

    def slots(self, tokens: int) -> int:
        """Return how many slots the first ``tokens`` tokens need at most, the last one's own included.

        A chunk's last token takes part in it even if it is dropped: where a picture ends the chunk, its last
        token may need a slot of its own.
        """
        told = self.told if self.told is not None and self.told.tokens <= tokens else Told(0, 0)
        ended = [(end, drops) for end, drops in self.drops if told.tokens < end <= tokens]
        dropped = sum(drops - (end == tokens and drops > 0) for end, drops in ended)
        return told.held + tokens - told.tokens - dropped


class Book:
    """The entries of all requests that the scheduler has."""

    def __init__(self) -> None:
        self._entries: dict[str, Entry] = {}

    def __len__(self) -> int:
        return len(self._entries)

    def open(self, request_id: str, entry: Entry) -> None:
        """Note a new request."""
        self._entries[request_id] = entry

    def close(self, request_id: str) -> None:
        """Forget a request that has ended."""
        self._entries.pop(request_id, None)

    def forget(self, request_id: str) -> None:
        """Forget what was told of a preempted request: it begins anew."""
        self._entries[request_id].told = None

    def tell(self, request_id: str, told: Told) -> None:
        """Note a message of the workers; one about a request that has ended is dropped."""
        if request_id in self._entries:
            self._entries[request_id].told = told

    def entry(self, request_id: str) -> Entry:
        """Return the entry of a request."""
        return self._entries[request_id]

    def slots(self, request_id: str, tokens: int) -> int:
        """Return how many slots a request needs for its first ``tokens`` tokens."""
        return self._entries[request_id].slots(tokens)
