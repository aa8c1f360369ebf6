"""The server: OpenAI's API from plain ``generate``, and the page."""

from __future__ import annotations

import asyncio
import json
import logging
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib.resources import files
from pathlib import Path
from typing import Any, cast

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import FileResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles

from dynamic_llava.page.answers import Form
from dynamic_llava.page.chat import Chat, read_chat
from dynamic_llava.page.engine import Answer, Engine
from dynamic_llava.page.errors import Refused
from dynamic_llava.page.guard import Guard
from dynamic_llava.page.limits import Limits

logger = logging.getLogger("uvicorn.error")  # the log of the server that runs this
STATIC = Path(str(files("dynamic_llava") / "page" / "static"))
SAFE = {
    "Content-Security-Policy": "default-src 'self'; img-src 'self' data: blob:; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}
"""Headers of the page: it loads nothing from elsewhere, and nobody puts it into a frame."""


def build(engine: Engine, limits: Limits, key: str = "") -> Starlette:
    """Return the server, as an ASGI application.

    Parameters
    ----------
    key
        What clients must send as a bearer token; empty lets everyone in.
    """
    served = Served(engine, limits)

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        yield
        await run_in_threadpool(engine.close)

    return Starlette(
        routes=[
            Route("/", page),
            Route("/health", served.health),
            Route("/v1/models", served.models),
            Route("/v1/chat/completions", served.chat, methods=["POST"]),
            Mount("/static", StaticFiles(directory=STATIC)),
        ],
        middleware=[Middleware(Guard, key=key, body_bytes=limits.body_bytes)],
        exception_handlers={
            Refused: refused,
            ClientDisconnect: left,
            HTTPException: not_found,
            Exception: broken,
        },
        lifespan=lifespan,
    )


class Served:
    """The API of one engine."""

    def __init__(self, engine: Engine, limits: Limits) -> None:
        self._engine, self._limits = engine, limits

    async def health(self, request: Request) -> Response:
        """Say that the server runs, and what answers."""
        return JSONResponse({"status": "ok", "engine": "transformers, one request at a time"})

    async def models(self, request: Request) -> Response:
        """List the one model."""
        model = {"id": self._engine.name, "object": "model", "created": 0, "owned_by": "dynamic-llava"}
        return JSONResponse({"object": "list", "data": [model]})

    async def chat(self, request: Request) -> Response:
        """Answer a chat, in one piece or as it comes."""
        try:
            body = json.loads(await request.body())
        except (ValueError, RecursionError) as error:
            raise Refused("the body is no JSON") from error
        chat = await run_in_threadpool(read_chat, body, self._limits)
        if isinstance(body.get("model"), str) and body["model"] != self._engine.name:
            raise Refused(f"there is no such model here, only {self._engine.name}", "model", 404)
        asked = Asked(self._engine, chat)
        form = Form(self._engine.name)
        if not chat.streams:
            return JSONResponse(form.whole(await asked.whole(request)))
        first = await asked.next()  # what is refused only now still gets a status of its own
        return StreamingResponse(events(asked, first, form, chat), media_type="text/event-stream")


class Asked:
    """A chat that the engine answers in its own thread, seen from here."""

    def __init__(self, engine: Engine, chat: Chat) -> None:
        loop, self._queue = asyncio.get_running_loop(), asyncio.Queue[str | Answer | Exception]()
        self.is_gone = threading.Event()

        def put(item: str | Answer | Exception) -> None:
            loop.call_soon_threadsafe(self._queue.put_nowait, item)

        engine.ask(chat, put, put, self.is_gone)

    async def next(self) -> str | Answer:
        """Return the next piece of text, or the answer when it is complete; raise what went wrong."""
        item = await self._queue.get()
        if isinstance(item, Exception):
            raise item
        return item

    async def whole(self, request: Request) -> Answer:
        """Return the answer when it is complete; stop it where the client has left."""
        leaving = asyncio.create_task(self._watch(request))
        try:
            while isinstance(item := await self.next(), str):
                pass
            return item
        finally:
            leaving.cancel()

    async def _watch(self, request: Request) -> None:
        while not await request.is_disconnected():
            await asyncio.sleep(0.5)
        self.is_gone.set()


async def events(asked: Asked, item: str | Answer, form: Form, chat: Chat) -> AsyncIterator[str]:
    """Yield an answer as server-sent events; stop it where the client has left."""
    is_first = True
    try:
        while isinstance(item, str):
            yield event(form.piece(item, is_first))
            is_first = False
            item = await asked.next()
        yield event(form.end(item))
        if chat.counts_in_stream:
            yield event(form.count(item))
        yield "data: [DONE]\n\n"
    except Exception:
        logger.exception("an answer broke off")
        yield event(Refused("the answer broke off, see the server's log", status=500).body())
    finally:
        asked.is_gone.set()


def event(content: dict[str, Any]) -> str:
    """Return a server-sent event."""
    return f"data: {json.dumps(content, ensure_ascii=False)}\n\n"


async def page(request: Request) -> Response:
    """Return the page."""
    return FileResponse(STATIC / "index.html", headers=SAFE)


async def refused(request: Request, error: Exception) -> Response:
    """Answer what was refused."""
    said = cast(Refused, error)
    return JSONResponse(said.body(), said.status)


async def left(request: Request, error: Exception) -> Response:
    """Answer a client that left in the midst of its body; nobody reads it."""
    return Response(status_code=400)


async def not_found(request: Request, error: Exception) -> Response:
    """Answer what is not served."""
    status = getattr(error, "status_code", 404)
    said = Refused(f"{request.method} {request.url.path} is not served here", status=status)
    return JSONResponse(said.body(), status)


async def broken(request: Request, error: Exception) -> Response:
    """Answer a fault of ours; the log has more."""
    return JSONResponse(Refused("the server failed on this request, see its log", status=500).body(), 500)
