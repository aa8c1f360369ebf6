"""What the page asks beside chats: which tokens of an answer were kept, a picture as the tower sees it."""

from __future__ import annotations

import base64
import json
from functools import cached_property
from io import BytesIO
from typing import Any

from starlette.concurrency import run_in_threadpool
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send
from transformers import ProcessorMixin

from dynamic_llava.chat.view import as_seen
from dynamic_llava.checkpoints import Source
from dynamic_llava.page.errors import Refused
from dynamic_llava.page.guard import refuse
from dynamic_llava.page.limits import Limits
from dynamic_llava.page.pictures import read_picture

KEPT, SEEN = "/sparsity/", "/seen"
"""The paths: for an answer, by the id that vLLM gave it; for a picture, which comes as ``{"url": ...}``."""


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

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request to one of the paths; ``scope`` has vLLM's application."""
        request, engine = Request(scope, receive), scope["app"].state.engine_client
        self._model = engine.model_config.model
        try:
            if scope["path"].startswith(KEPT):
                answer = await kept(engine, scope["path"].removeprefix(KEPT))
            else:
                data = await request.body()
                answer = JSONResponse(await run_in_threadpool(self._seen, data))
        except ClientDisconnect:
            return
        except Refused as error:
            await refuse(error, scope, receive, send)
            return
        await answer(scope, receive, send)

    def _seen(self, data: bytes) -> dict[str, str | None]:
        """Return a picture as the tower sees it, as a data address; None where it sees several of it."""
        try:
            body = json.loads(data)
        except (ValueError, RecursionError) as error:
            raise Refused("the body is no JSON") from error
        if not isinstance(body, dict) or not isinstance(body.get("url"), str):
            raise Refused("url must be a picture's address", "url")
        image = read_picture(body["url"], 1, self._limits)
        pixels = self._processor.image_processor([image], return_tensors="pt")["pixel_values"]
        return {"seen": png(self._processor, pixels[0]) if pixels.ndim == 4 else None}

    @cached_property
    def _processor(self) -> Any:
        return Source(self._model).processor


async def kept(engine: Any, name: str) -> Response:
    """Return what was kept of an answer."""
    found = None
    if engine.vllm_config.parallel_config.worker_cls.startswith("dynamic_llava."):
        found = (await engine.collective_rpc("kept", args=(name,)))[0]  # all workers know the same
    if found is None:
        raise Refused(
            f"nothing is known of {name[:80]!r}: ask with sparsity.explain, and soon after the answer",
            status=404,
        )
    return JSONResponse(found)


def png(processor: ProcessorMixin, pixels_CHW: Any) -> str:
    """Return a picture as the vision tower gets it, as a data address."""
    data = BytesIO()
    as_seen(processor, pixels_CHW).save(data, "PNG")
    return "data:image/png;base64," + base64.b64encode(data.getvalue()).decode()
