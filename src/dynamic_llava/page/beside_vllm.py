"""The page beside vLLM's server, as a middleware: ``--middleware dynamic_llava.page.beside_vllm.Beside``."""

from __future__ import annotations

import json
from typing import Any

from starlette.applications import Starlette
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from dynamic_llava.page.app import STATIC, page
from dynamic_llava.page.errors import Refused
from dynamic_llava.page.guard import Guard, refuse
from dynamic_llava.page.limits import Limits

CHAT = "/v1/chat/completions"


class Beside:
    """Serves the page, bounds bodies, and puts ``sparsity`` where vLLM hands it on to the plugin.

    Parameters
    ----------
    app
        vLLM's server.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._page = Starlette(routes=[Route("/", page), Mount("/static", StaticFiles(directory=STATIC))])
        self._vllm = app
        # The key is vLLM's own affair.
        self._guarded = Guard(self._route, key="", body_bytes=Limits().body_bytes)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve a request, or let vLLM do it."""
        await self._guarded(scope, receive, send)

    async def _route(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = scope.get("path", "")
        if scope["type"] == "http" and (path == "/" or path.startswith("/static/")):
            await self._page(scope, receive, send)
        elif scope["type"] == "http" and path == CHAT and scope["method"] == "POST":
            await self._chat(scope, receive, send)
        else:
            await self._vllm(scope, receive, send)

    async def _chat(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            body = with_xargs(await whole(receive))
        except Refused as error:
            await refuse(error, scope, receive, send)
            return
        lengths = {b"content-length", b"transfer-encoding"}
        headers = [pair for pair in scope["headers"] if pair[0] not in lengths]
        headers.append((b"content-length", str(len(body)).encode()))
        scope = {**scope, "headers": headers}
        is_sent = False

        async def again() -> Message:
            nonlocal is_sent
            if is_sent:
                return await receive()
            is_sent = True
            return {"type": "http.request", "body": body, "more_body": False}

        await self._vllm(scope, again, send)


async def whole(receive: Receive) -> bytes:
    """Return the body of a request."""
    parts: list[bytes] = []
    while True:
        message = await receive()
        parts.append(message.get("body", b""))
        if not message.get("more_body", False):
            return b"".join(parts)


def with_xargs(data: bytes) -> bytes:
    """Return a chat's body with ``sparsity`` moved into ``vllm_xargs``; what is no chat stays as it is."""
    try:
        body: Any = json.loads(data)
    except (ValueError, RecursionError):
        return data  # vLLM says what is wrong
    if not isinstance(body, dict) or "sparsity" not in body:
        return data
    asked, others = body.pop("sparsity"), body.get("vllm_xargs") or {}
    for name, value in (("sparsity", asked), ("vllm_xargs", others)):
        if not isinstance(value, dict):
            raise Refused(f"{name} must be an object", name)
    asked = {name: int(value) if isinstance(value, bool) else value for name, value in asked.items()}
    asked.pop("explain", None)  # vLLM does not tell
    body["vllm_xargs"] = others | asked
    return json.dumps(body).encode()
