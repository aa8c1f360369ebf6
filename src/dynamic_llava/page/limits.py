"""What a server lets in."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Limits:
    """Bounds on requests.

    Attributes
    ----------
    body_bytes
        Longest body of a request.
    pictures
        Most pictures of a request.
    pixels
        Most pixels of a picture.
    picture_hosts
        Hosts whose pictures are fetched, by https; none by default.
    new_tokens
        Longest answer, and the one of requests that do not say.
    waiting
        Most requests that wait for their turn.
    """

    body_bytes: int = 32 << 20
    pictures: int = 8
    pixels: int = 16_000_000
    picture_hosts: tuple[str, ...] = ()
    new_tokens: int = 512
    waiting: int = 64
