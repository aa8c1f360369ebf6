"""What the page asks beside chats: which tokens of an answer were kept, a picture as the tower sees it."""

from __future__ import annotations

import asyncio
import base64
import json
import logging
from functools import cached_property
from io import BytesIO
from typing import Any

from PIL import Image
from starlette.concurrency import run_in_threadpool
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse
from starlette.types import Receive, Scope, Send
from transformers import ProcessorMixin

from dynamic_llava.chat.view import as_seen
from dynamic_llava.checkpoints import Source
from dynamic_llava.page.errors import Refused
from dynamic_llava.page.guard import refuse
from dynamic_llava.page.limits import Limits
from dynamic_llava.page.pictures import read_picture

logger = logging.getLogger("uvicorn.error")  # the log of the server that runs this
KEPT, SEEN = "/sparsity/", "/seen"
"""The paths: for an answer, by the id that vLLM gave it; for a picture, which comes as ``{"url": ...}``."""

METHODS = {KEPT: "GET", SEEN: "POST"}
WAITING = 16
"""Most requests that wait: they are answered one at a time, and chats go on meanwhile."""

SECONDS = 10
"""Longest wait for the engine."""


class Looking:
    """Serves both, from vLLM's engine and the checkpoint's processor.

    Parameters
    ----------
    limits
        Bounds on pictures.
    """

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._model = ""
        self._turn, self._waiting = asyncio.Lock(), 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request to one of the paths; ``scope`` has vLLM's application."""
        request = Request(scope, receive)
        try:
            answer = JSONResponse(await self._answer(request, scope["app"].state.engine_client))
        except ClientDisconnect:
            return
        except Refused as error:
            await refuse(error, scope, receive, send)
            return
        await answer(scope, receive, send)

    async def _answer(self, request: Request, engine: Any) -> dict[str, Any]:
        path = request.url.path
        kind = SEEN if path == SEEN else KEPT
        if request.method != METHODS[kind]:
            raise Refused(f"{kind} takes {METHODS[kind]} alone", status=405)
        data = await request.body()  # before it counts: who sends slowly holds up nobody
        if self._waiting >= WAITING:
            raise Refused("the server is busy, try again later", status=503)
        self._waiting += 1
        try:
            async with self._turn:
                if kind == KEPT:
                    return await kept(engine, path.removeprefix(KEPT))
                self._model = engine.model_config.model
                return await run_in_threadpool(self._seen, data)
        finally:
            self._waiting -= 1

    def _seen(self, data: bytes) -> dict[str, Any]:
        """Return a picture as the tower sees it, as a data address; None where it sees several of it."""
        try:
            body = json.loads(data)
        except (ValueError, RecursionError) as error:
            raise Refused("the body is no JSON") from error
        if not isinstance(body, dict) or not str(body.get("url")).startswith("data:"):
            raise Refused("url must be a picture as data:image/...;base64,...", "url")
        image = read_picture(body["url"], 1, self._limits)
        return {"seen": png(self._processor, self._pixels(image)[0]) if self._sees_one else None}

    @cached_property
    def _sees_one(self) -> bool:
        """Whether the tower gets one square of each picture."""
        if not hasattr(self._processor, "image_processor"):
            return False
        return bool(self._pixels(Image.new("RGB", (64, 64))).ndim == 4)

    def _pixels(self, image: Image.Image) -> Any:
        try:
            return self._processor.image_processor([image], return_tensors="pt")["pixel_values"]
        except ValueError as error:
            raise Refused(f"the picture cannot be used: {error}", "url") from error

    @cached_property
    def _processor(self) -> Any:
        try:
            return Source(self._model).processor
        except (OSError, ValueError):
            logger.exception("the page cannot draw pictures: the checkpoint's processor does not load")
            return None


async def kept(engine: Any, name: str) -> dict[str, Any]:
    """Return what was kept of an answer."""
    found = None
    if engine.vllm_config.parallel_config.worker_cls.startswith("dynamic_llava."):
        try:
            told = await asyncio.wait_for(engine.collective_rpc("kept", args=(name,)), SECONDS)
        except Exception as error:  # the engine ends, or is gone, or has no time: all are its own classes
            raise Refused("the engine does not tell now, try again later", status=503) from error
        found = told[0]  # all workers know the same
    if found is None:
        raise Refused(
            f"nothing is known of {name[:80]!r}: ask with sparsity.explain, and soon after the answer",
            status=404,
        )
    answer: dict[str, Any] = found
    return answer


def png(processor: ProcessorMixin, pixels_CHW: Any) -> str:
    """Return a picture as the vision tower gets it, as a data address."""
    data = BytesIO()
    as_seen(processor, pixels_CHW).save(data, "PNG")
    return "data:image/png;base64," + base64.b64encode(data.getvalue()).decode()
