"""The page beside vLLM's server, whose place a small application takes here."""

from __future__ import annotations

import asyncio
import base64
import json
import struct
import zlib
from io import BytesIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route
from starlette.testclient import TestClient
from tests.page.conftest import RED

from dynamic_llava.checkpoints import resolve
from dynamic_llava.page import looking
from dynamic_llava.page.beside_vllm import Beside, checked
from dynamic_llava.page.limits import Limits

CHAT = "/v1/chat/completions"
LIMITS = Limits(pixels=10_000)
NANO = SimpleNamespace(model=resolve("nano"))


KEY = "Bearer secret"


async def models(request: Request) -> JSONResponse:
    is_known = request.headers.get("authorization") == KEY
    return JSONResponse({}, 200) if is_known else JSONResponse({"error": "Unauthorized"}, 401)


class FakeEngine:
    """What is asked of vLLM's: it knows one answer."""

    def __init__(self, worker: str = "dynamic_llava.vllm.workers.cpu.SparseWorker") -> None:
        parallel = SimpleNamespace(worker_cls=worker)
        self.vllm_config, self.model_config = SimpleNamespace(parallel_config=parallel), NANO

    async def collective_rpc(self, method: str, args: tuple[str]) -> list[Any]:
        assert method == "kept"
        if args == ("broken",):
            raise RuntimeError("the engine is gone")
        return [{"output_kept": [True]} if args == ("chatcmpl-1",) else None]


async def echo(request: Request) -> JSONResponse:
    data = await request.body()
    return JSONResponse({"body": json.loads(data), "length": int(request.headers["content-length"])})


PATHS = (CHAT, "/v1/completions", "/v1/messages", "/invocations", "/scale_elastic_ep", "/tokenize")


@pytest.fixture(scope="module")
def client() -> TestClient:
    return served(FakeEngine())


def served(engine: FakeEngine) -> TestClient:
    routes = [Route(path, echo, methods=["POST"]) for path in PATHS]
    app = Starlette(
        routes=[*routes, Route("/v1/models", models)], middleware=[Middleware(Beside, limits=LIMITS)]
    )
    app.state.engine_client = engine
    return TestClient(app)


def test_it_serves_the_page(client: TestClient) -> None:
    assert "Dynamic-LLaVA" in client.get("/").text
    assert client.get("/static/page.js").status_code == 200
    assert client.get("/v1/other").status_code == 404


def test_rates_go_where_vllm_hands_them_on(client: TestClient) -> None:
    asked = {"messages": [], "sparsity": {"dense": True, "image_keep_rate": 0.3, "explain": True}}
    found: dict[str, Any] = client.post(CHAT, json=asked | {"vllm_xargs": {"mine": 1}}).json()
    rates = {"dense": 1, "image_keep_rate": 0.3, "explain": 1}
    assert found["body"] == {"messages": [], "vllm_xargs": {"mine": 1} | rates}
    assert found["length"] == len(checked(json.dumps(asked | {"vllm_xargs": {"mine": 1}}).encode(), LIMITS))


@pytest.mark.parametrize("data", [b"{", b"[]", b'{"messages": []}', b"\xff"])
def test_other_bodies_stay_as_they_are(data: bytes) -> None:
    assert checked(data, LIMITS) == data


@pytest.mark.parametrize("wrong", ['{"sparsity": 1}', '{"sparsity": {}, "vllm_xargs": 1}'])
def test_what_is_no_object_is_refused(client: TestClient, wrong: str) -> None:
    answer = client.post(CHAT, content=wrong)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] in ("sparsity", "vllm_xargs")


def test_long_bodies_are_refused(client: TestClient) -> None:
    assert client.post(CHAT, content=b" " * ((32 << 20) + 1)).status_code == 413


@pytest.mark.parametrize("path", ["/invocations", "/scale_elastic_ep"])
def test_what_vllm_serves_without_the_key_is_closed(client: TestClient, path: str) -> None:
    answer = client.post(path, json={})
    assert answer.status_code == 404
    assert answer.json()["error"]["message"] == f"POST {path} is not served here, see docs/serving.md"
    assert client.post("/tokenize", json={}).status_code == 200


def bomb(width: int, height: int) -> str:
    """Return a picture whose header promises so many pixels."""
    data = bytearray(base64.b64decode(RED.partition(",")[2]))
    data[16:24] = struct.pack(">II", width, height)
    data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
    return base64.b64encode(data).decode()


@pytest.mark.parametrize(
    ("size", "said"),
    [((200, 200), "200 x 200 pixels"), ((1, 101), "over 100 times"), ((40_000, 40_000), "64 megapixels")],
)
@pytest.mark.parametrize("form", ["openai", "anthropic"])
def test_pictures_that_grow_too_large_do_not_reach_vllm(
    client: TestClient, size: tuple[int, int], said: str, form: str
) -> None:
    if form == "openai":
        part: dict[str, Any] = {"image_url": {"url": "data:image/png;base64," + bomb(*size)}}
        path = CHAT
    else:
        part = {"source": {"type": "base64", "media_type": "image/png", "data": bomb(*size)}}
        path = "/v1/messages"
    answer = client.post(path, json={"messages": [{"role": "user", "content": [part]}]})
    assert answer.status_code == 400
    assert said in answer.json()["error"]["message"]


def test_a_client_that_leaves_within_its_body_asks_nothing() -> None:
    reached: list[Any] = []

    async def vllm(scope: Any, receive: Any, send: Any) -> None:
        reached.append(await receive())

    said: list[Any] = []
    messages = [
        {"type": "http.request", "body": b'{"messages": []}', "more_body": True},
        {"type": "http.disconnect"},
    ]

    async def receive() -> Any:
        return messages.pop(0)

    async def send(message: Any) -> None:
        said.append(message)

    scope = {"type": "http", "method": "POST", "path": CHAT, "headers": []}
    asyncio.run(Beside(vllm)(scope, receive, send))
    assert (reached, said) == ([], [])


def test_what_was_kept_is_told_to_whom_vllm_answers(client: TestClient) -> None:
    knows = {"Authorization": KEY}
    assert client.get("/sparsity/chatcmpl-1", headers=knows).json() == {"output_kept": [True]}
    refused = client.get("/sparsity/chatcmpl-1")
    assert (refused.status_code, refused.json()) == (401, {"error": "Unauthorized"})
    assert client.post("/seen", json={"url": RED}).status_code == 401
    unknown = client.get("/sparsity/chatcmpl-2", headers=knows)
    assert unknown.status_code == 404
    assert "chatcmpl-2" in unknown.json()["error"]["message"]


def test_a_model_without_a_sparsifier_knows_nothing_of_an_answer() -> None:
    answer = served(FakeEngine("vllm.v1.worker.cpu_worker.CPUWorker")).get(
        "/sparsity/chatcmpl-1", headers={"Authorization": KEY}
    )
    assert answer.status_code == 404


def test_a_picture_comes_back_as_the_tower_sees_it(client: TestClient) -> None:
    answer = client.post("/seen", json={"url": RED}, headers={"Authorization": KEY})
    data = base64.b64decode(answer.json()["seen"].partition(",")[2])
    image = Image.open(BytesIO(data)).convert("RGB")
    assert image.size == (96, 96)
    assert image.getpixel((0, 0))[0] > 250 > 5 > image.getpixel((0, 0))[1]


@pytest.mark.parametrize("body", [b"{", b"[]", b'{"url": 1}', b'{"url": "data:image/png;base64,AAAA"}'])
def test_what_is_no_picture_is_refused(client: TestClient, body: bytes) -> None:
    assert client.post("/seen", content=body, headers={"Authorization": KEY}).status_code == 400


def test_pictures_from_elsewhere_are_not_fetched(client: TestClient) -> None:
    answer = client.post("/seen", json={"url": "https://localhost/a.png"}, headers={"Authorization": KEY})
    assert answer.status_code == 400
    assert "url must be a picture as data:" in answer.json()["error"]["message"]


@pytest.mark.parametrize(("method", "path"), [("DELETE", "/sparsity/chatcmpl-1"), ("GET", "/seen")])
def test_other_methods_are_refused(client: TestClient, method: str, path: str) -> None:
    assert client.request(method, path, headers={"Authorization": KEY}).status_code == 405


def test_an_engine_that_does_not_tell_is_no_fault_of_the_page(client: TestClient) -> None:
    answer = client.get("/sparsity/broken", headers={"Authorization": KEY})
    assert answer.status_code == 503
    assert "try again later" in answer.json()["error"]["message"]


def test_a_model_that_sees_no_single_square_shows_none(tmp_path: Path) -> None:
    engine = FakeEngine()
    engine.model_config = SimpleNamespace(model=str(tmp_path))  # it has no processor at all
    answer = served(engine).post("/seen", json={"url": RED}, headers={"Authorization": KEY})
    assert answer.json() == {"seen": None}


def test_questions_wait_their_turn_and_few_of_them() -> None:
    engine, most = FakeEngine(), looking.WAITING
    at_once = 0

    async def slow(method: str, args: tuple[str]) -> list[Any]:
        nonlocal at_once
        at_once += 1
        assert at_once == 1
        await asyncio.sleep(0.01)
        at_once -= 1
        return [{"name": args[0]}]

    engine.collective_rpc = slow  # type: ignore[method-assign]
    app = SimpleNamespace(state=SimpleNamespace(engine_client=engine))
    made, statuses = looking.Looking(LIMITS), []

    async def ask(number: int) -> None:
        async def receive() -> Any:
            return {"type": "http.request", "body": b"", "more_body": False}

        async def send(message: Any) -> None:
            if message["type"] == "http.response.start":
                statuses.append(message["status"])

        scope = {
            "type": "http", "method": "GET", "path": f"/sparsity/{number}", "headers": [], "app": app,
            "query_string": b"", "server": ("localhost", 80), "scheme": "http",
        }  # fmt: skip
        await made(scope, receive, send)

    async def all_at_once() -> None:
        await asyncio.gather(*map(ask, range(most + 4)))

    asyncio.run(all_at_once())
    assert (statuses.count(200), statuses.count(503)) == (most, 4)


def test_who_sends_slowly_holds_up_nobody() -> None:
    app = SimpleNamespace(state=SimpleNamespace(engine_client=FakeEngine()))
    made, statuses = looking.Looking(LIMITS), []

    async def never() -> Any:
        await asyncio.sleep(60)

    async def at_once() -> Any:
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message: Any) -> None:
        statuses.append(message.get("status"))

    scope = {
        "type": "http", "method": "GET", "path": "/sparsity/chatcmpl-1", "headers": [], "app": app,
        "query_string": b"", "server": ("localhost", 80), "scheme": "http",
    }  # fmt: skip

    async def all_at_once() -> None:
        slow = [asyncio.create_task(made(scope, never, send)) for _ in range(looking.WAITING)]
        await asyncio.sleep(0)
        await made(scope, at_once, send)
        for task in slow:
            task.cancel()

    asyncio.run(all_at_once())
    assert statuses[0] == 200
