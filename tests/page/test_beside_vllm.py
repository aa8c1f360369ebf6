"""The page beside vLLM's server, whose place a small application takes here."""

from __future__ import annotations

import json
from typing import Any

import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route
from starlette.testclient import TestClient

from dynamic_llava.page.beside_vllm import Beside, with_xargs

CHAT = "/v1/chat/completions"


async def echo(request: Request) -> JSONResponse:
    data = await request.body()
    return JSONResponse({"body": json.loads(data), "length": int(request.headers["content-length"])})


@pytest.fixture(scope="module")
def client() -> TestClient:
    return TestClient(Beside(Starlette(routes=[Route(CHAT, echo, methods=["POST"])])))


def test_it_serves_the_page(client: TestClient) -> None:
    assert "Dynamic-LLaVA" in client.get("/").text
    assert client.get("/static/page.js").status_code == 200
    assert client.get("/v1/other").status_code == 404


def test_rates_go_where_vllm_hands_them_on(client: TestClient) -> None:
    asked = {"messages": [], "sparsity": {"dense": True, "image_keep_rate": 0.3, "explain": True}}
    found: dict[str, Any] = client.post(CHAT, json=asked | {"vllm_xargs": {"mine": 1}}).json()
    assert found["body"] == {"messages": [], "vllm_xargs": {"mine": 1, "dense": 1, "image_keep_rate": 0.3}}
    assert found["length"] == len(with_xargs(json.dumps(asked | {"vllm_xargs": {"mine": 1}}).encode()))


@pytest.mark.parametrize("data", [b"{", b"[]", b'{"messages": []}', b"\xff"])
def test_other_bodies_stay_as_they_are(data: bytes) -> None:
    assert with_xargs(data) == data


@pytest.mark.parametrize("wrong", ['{"sparsity": 1}', '{"sparsity": {}, "vllm_xargs": 1}'])
def test_what_is_no_object_is_refused(client: TestClient, wrong: str) -> None:
    answer = client.post(CHAT, content=wrong)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] in ("sparsity", "vllm_xargs")


def test_long_bodies_are_refused(client: TestClient) -> None:
    assert client.post(CHAT, content=b" " * ((32 << 20) + 1)).status_code == 413
