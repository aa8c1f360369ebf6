"""The whole server with vLLM, as users start it: many clients, wrong requests, an engine that is killed."""

from __future__ import annotations

import asyncio
import random
import signal
import time
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed; make check-vllm installs it")

import psutil
from evidence.serving import Chat

from evidence import serving, serving_fuzz, serving_process, serving_shots

STREAMS, SECONDS = 32, 60
CHATS = 48


@pytest.fixture(scope="module")
def chats() -> Sequence[Chat]:
    return serving.answered(serving.draw(CHATS, seed=3))


def asked(server: serving_process.Server, chats: Sequence[Chat], most: int) -> dict[str, Any]:
    return asyncio.run(serving.load(f"{server.address}/v1", "", chats, STREAMS, SECONDS, most))


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_many_clients_then_wrong_requests_then_a_killed_engine_then_a_restart(
    chats: Sequence[Chat], tmp_path: Path
) -> None:
    line = serving_process.vllm_line()
    with serving_process.running(line, tmp_path / "first") as server:
        found = asked(server, chats, most=2 * CHATS)
        assert (found["wrong"], found["lost"]) == ([], [])
        assert found["right"] + found["left_by_their_clients"] == found["asked"]
        wrong = serving_fuzz.Seen()
        asyncio.run(serving_fuzz.shoot_all(server.port, shots(), wrong))
        assert wrong.unanswered == []
        found = asked(server, chats, most=STREAMS)
        assert (found["wrong"], found["lost"]) == ([], [])
        below = server.below()

        killed = asyncio.run(kill_under_load(server, chats))

        assert killed["seconds"] < SECONDS  # every client was told
        assert killed["lost"]  # and none took a piece of an answer for the whole
        assert killed["wrong"] == []
        server.process.wait(SECONDS)  # so that what watches over it can start it again
        _, alive = psutil.wait_procs(below, timeout=SECONDS)
        assert not alive, "processes were left over"
    again = serving_process.vllm_line(port=server.port)
    with serving_process.running(again, tmp_path / "second") as server:
        found = asked(server, chats, most=STREAMS)
        assert (found["wrong"], found["lost"]) == ([], [])


def shots() -> list[serving_shots.Shot]:
    """Return wrong requests of all kinds; the evidence sends 10,000, and compares with stock vLLM."""
    return [shot for kind in serving_shots.KINDS.values() for shot in islice(kind(random.Random(0)), 25)]


async def kill_under_load(server: serving_process.Server, chats: Sequence[Chat]) -> dict[str, Any]:
    """Kill the engine while all clients wait, and let every one of them come to an end."""
    from openai import AsyncOpenAI

    client = AsyncOpenAI(base_url=f"{server.address}/v1", api_key="none", max_retries=0, timeout=2 * SECONDS)
    found = serving.Found()
    # No number is that of a client who leaves.
    clients = [asyncio.create_task(serving.ask(client, "nano", 0, chat, found)) for chat in chats[:STREAMS]]
    while not found.tokens:
        await asyncio.sleep(0.01)
    server.engine().send_signal(signal.SIGKILL)
    started = time.monotonic()
    await asyncio.gather(*clients)
    return {
        "seconds": time.monotonic() - started,
        "lost": found.lost,
        "wrong": found.wrong,
        "right": found.right,
    }
