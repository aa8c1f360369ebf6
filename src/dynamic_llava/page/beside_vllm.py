"""The page beside vLLM's server, as a middleware: ``--middleware dynamic_llava.page.beside_vllm.Beside``."""

from __future__ import annotations

import json
from typing import Any

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.requests import ClientDisconnect
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from dynamic_llava.page.app import STATIC, page
from dynamic_llava.page.errors import Refused
from dynamic_llava.page.guard import Guard, refuse
from dynamic_llava.page.limits import Limits
from dynamic_llava.page.looking import KEPT, SEEN, Looking
from dynamic_llava.page.pictures import check_inline

ASKS_FOR_THE_KEY = ("/v1/", "/v2/", "/inference/", "/cohere/")
OPEN = ("/health", "/ping", "/load", "/version", "/metrics", "/tokenize", "/detokenize", "/openapi.json")
"""What is served of vLLM: it asks for the key before the former, and answers the latter to everyone. The rest
is closed: /invocations would chat, and /scale_elastic_ep change the engine, without the key."""

MODELS = "/v1/models"
"""Whom vLLM answers this may look as well; so its key counts, wherever it was given."""


class Beside:
    """Serves the page, bounds what comes in, and puts ``sparsity`` where vLLM hands it on to the plugin.

    Parameters
    ----------
    app
        vLLM's server.
    limits
        Bounds on bodies and pictures.
    """

    def __init__(self, app: ASGIApp, limits: Limits | None = None) -> None:
        self._page = Starlette(routes=[Route("/", page), Mount("/static", StaticFiles(directory=STATIC))])
        self._vllm, self._limits = app, limits or Limits()
        self._looking = Looking(self._limits)
        # The key is vLLM's own affair.
        self._guarded = Guard(self._route, key="", body_bytes=self._limits.body_bytes)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve a request, or let vLLM do it."""
        await self._guarded(scope, receive, send)

    async def _route(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._vllm(scope, receive, send)
            return
        path = scope["path"]
        if path == "/" or path.startswith("/static/"):
            await self._page(scope, receive, send)
        elif path == SEEN or path.startswith(KEPT):
            if await self._lets_in(scope, send):
                await self._looking(scope, receive, send)
        elif not (path.startswith(ASKS_FOR_THE_KEY) or path in OPEN):
            said = Refused(f"{scope['method']} {path} is not served here, see docs/serving.md", status=404)
            await refuse(said, scope, receive, send)
        elif scope["method"] == "POST":
            await self._post(scope, receive, send)
        else:
            await self._vllm(scope, receive, send)

    async def _lets_in(self, scope: Scope, send: Send) -> bool:
        """Return whether vLLM shows its models to a client; else hand on its answer, which says why not."""
        said: list[Message] = []

        async def nothing() -> Message:
            return {"type": "http.request", "body": b"", "more_body": False}

        async def hear(message: Message) -> None:
            said.append(message)

        models = {"method": "GET", "path": MODELS, "raw_path": MODELS.encode(), "query_string": b""}
        await self._vllm({**scope, **models}, nothing, hear)
        if said[0]["status"] == 200:
            return True
        for message in said:
            await send(message)
        return False

    async def _post(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            body = await run_in_threadpool(checked, await whole(receive), self._limits)
        except Refused as error:
            await refuse(error, scope, receive, send)
            return
        except ClientDisconnect:
            return  # half of a body is no request
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
    """Return the body of a request.

    Raises
    ------
    ClientDisconnect
        Its client left before it was complete.
    """
    parts: list[bytes] = []
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientDisconnect
        parts.append(message.get("body", b""))
        if not message.get("more_body", False):
            return b"".join(parts)


def checked(data: bytes, limits: Limits) -> bytes:
    """Return a body with ``sparsity`` moved into ``vllm_xargs``; what is no JSON object stays as it is.

    Raises
    ------
    Refused
        A picture in it has too many pixels, or ``sparsity`` is of no use.
    """
    try:
        body: Any = json.loads(data)
    except (ValueError, RecursionError):
        return data  # vLLM says what is wrong
    check_inline(body, limits)
    if not isinstance(body, dict) or "sparsity" not in body:
        return data
    asked, others = body.pop("sparsity"), body.get("vllm_xargs") or {}
    for name, value in (("sparsity", asked), ("vllm_xargs", others)):
        if not isinstance(value, dict):
            raise Refused(f"{name} must be an object", name)
    asked = {name: int(value) if isinstance(value, bool) else value for name, value in asked.items()}
    body["vllm_xargs"] = others | asked
    return json.dumps(body).encode()
