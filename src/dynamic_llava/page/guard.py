"""What stands before a server: the key, and the bound on bodies."""

from __future__ import annotations

import hmac
from typing import Any

from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from dynamic_llava.page.errors import Refused

DIGITS = 18  # Python refuses to read numbers of thousands of them


class Guard:
    """Asks for the key before ``/v1``, and refuses bodies that are too long, also those of unknown length.

    Parameters
    ----------
    app
        What it stands before.
    key
        The key; empty lets everyone in.
    body_bytes
        Longest body.
    """

    def __init__(self, app: ASGIApp, key: str, body_bytes: int) -> None:
        self._app, self._key, self._longest = app, key, body_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let a request pass, or answer it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        if scope["path"].startswith("/v1/") and not self._knows(headers.get(b"authorization", b"")):
            await refuse(
                Refused("the key is missing or wrong: Authorization: Bearer KEY", status=401),
                scope,
                receive,
                send,
            )
            return
        length = headers.get(b"content-length", b"0")
        if not length.isdigit() or len(length) > DIGITS or int(length) > self._longest:
            await refuse(self._too_long(), scope, receive, send)
            return
        seen = 0

        async def counted() -> Message:
            nonlocal seen
            message = await receive()
            seen += len(message.get("body", b""))
            if seen > self._longest:
                raise self._too_long()
            return message

        await self._app(scope, counted, send)

    def _knows(self, authorization: bytes) -> bool:
        expected = f"Bearer {self._key}".encode()
        return not self._key or hmac.compare_digest(authorization, expected)

    def _too_long(self) -> Refused:
        return Refused(f"the body is too long: at most {self._longest:,} bytes", status=413)


async def refuse(refused: Refused, scope: Scope, receive: Receive, send: Send) -> None:
    """Answer with an error."""
    answer: Any = JSONResponse(refused.body(), refused.status)
    await answer(scope, receive, send)
