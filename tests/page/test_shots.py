"""Wrong, broken, cut off and abandoned requests at both servers, over sockets; the evidence sends more."""

from __future__ import annotations

import asyncio
import random
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from typing import Any

import pytest
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from dynamic_llava.page.app import build
from dynamic_llava.page.beside_vllm import Beside
from dynamic_llava.page.engine import Engine
from dynamic_llava.page.limits import Limits
from evidence import serving_fuzz, serving_shots

EACH = 60  # shots of a kind
LIMITS = Limits(pixels=1_000_000, new_tokens=60)


@contextmanager
def listening(app: Any) -> Iterator[int]:
    """Serve an application in a thread; gives the port."""
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="critical", lifespan="off"))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            time.sleep(0.01)
        yield server.servers[0].sockets[0].getsockname()[1]
    finally:
        server.should_exit = True
        thread.join(60)


def shots(kind: str) -> list[serving_shots.Shot]:
    drawn = [*islice(serving_shots.KINDS[kind](random.Random(kind)), EACH)]
    model = b'"model": "nano"', b'"model": "tiny"'  # as many bytes
    return [serving_shots.Shot(kind, shot.sent.replace(*model), shot.leaves, shot.is_due) for shot in drawn]


@pytest.mark.parametrize("kind", serving_shots.KINDS)
def test_the_server_without_vllm_survives(engine: Engine, kind: str) -> None:
    seen = serving_fuzz.Seen()
    with listening(build(engine, LIMITS)) as port:
        asyncio.run(serving_fuzz.shoot_all(port, shots(kind), seen))
        last = serving_shots.Shot("good", good(), serving_shots.PATIENCE)
        assert asyncio.run(serving_fuzz.shoot(port, last)) == (200, False)
    assert {status for _, status in seen.failed} <= {503}  # more came than may wait
    assert seen.unanswered == []
    assert seen.sent == EACH


@pytest.mark.parametrize("kind", serving_shots.KINDS)
def test_what_stands_before_vllm_survives(kind: str) -> None:
    async def echo(request: Request) -> JSONResponse:
        return JSONResponse({"bytes": len(await request.body())})

    app = Beside(Starlette(routes=[Route("/{path:path}", echo, methods=["GET", "POST"])]), LIMITS)
    seen = serving_fuzz.Seen()
    with listening(app) as port:
        asyncio.run(serving_fuzz.shoot_all(port, shots(kind), seen))
        last = serving_shots.Shot("good", good(), serving_shots.PATIENCE)
        assert asyncio.run(serving_fuzz.shoot(port, last)) == (200, False)
    assert seen.failed == []
    assert seen.unanswered == []


def good() -> bytes:
    return serving_shots.request(b'{"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 2}')
