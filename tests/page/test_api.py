"""OpenAI's API from plain ``generate``."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from starlette.testclient import TestClient
from tests.page.conftest import LIMITS, RED, address

import dynamic_llava
from dynamic_llava.chat.asking import ask
from dynamic_llava.page.app import build
from dynamic_llava.page.engine import Engine
from dynamic_llava.page.limits import Limits

CHAT = "/v1/chat/completions"
Body = Callable[..., dict[str, Any]]


def pieces(text: str) -> list[dict[str, Any]]:
    lines = [line.removeprefix("data: ") for line in text.splitlines() if line]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


def test_it_answers_as_the_library_does(client: TestClient, checkpoint: Path, body: Body) -> None:
    model, processor = dynamic_llava.load(checkpoint, device="cpu")
    picture = Image.new("RGB", (40, 40), (255, 0, 0))
    expected = ask(model, processor, "What is there?", [picture], 12)
    found = client.post(CHAT, json=body()).json()
    assert found["choices"][0]["message"]["content"].strip() == expected.text
    assert found["choices"][0]["finish_reason"] == "length"
    assert found["usage"]["completion_tokens"] == len(expected.token_ids)
    summary = expected.report.summary()
    for name in ("image_tokens_kept", "output_tokens_kept", "kv_bytes", "kv_bytes_dense"):
        assert found["sparsity"][name] == summary[name]


def test_it_streams_the_same(client: TestClient, body: Body) -> None:
    whole = client.post(CHAT, json=body()).json()
    found = pieces(client.post(CHAT, json=body(stream=True, stream_options={"include_usage": True})).text)
    said = "".join(piece["choices"][0]["delta"].get("content", "") for piece in found if piece["choices"])
    assert said.strip() == whole["choices"][0]["message"]["content"].strip()
    assert found[0]["choices"][0]["delta"]["role"] == "assistant"
    assert found[-1]["usage"] == whole["usage"]
    assert found[-2]["choices"][0]["finish_reason"] == "length"
    assert found[-2]["sparsity"]["kv_bytes"] == whole["sparsity"]["kv_bytes"]


def test_it_explains_what_was_kept(client: TestClient, body: Body) -> None:
    sparsity = client.post(CHAT, json=body(sparsity={"explain": True, "image_keep_rate": 0.25})).json()[
        "sparsity"
    ]
    (picture,) = sparsity["pictures"]
    assert (picture["tokens"], picture["side"], len(picture["kept"])) == (144, 12, 36)
    assert picture["seen"].startswith("data:image/png;base64,")
    dropped = sparsity["output_tokens"] - sparsity["output_tokens_kept"]
    assert sum(not word["kept"] for word in sparsity["words"]) == dropped


def test_rates_are_those_of_their_request_alone(client: TestClient, body: Body) -> None:
    plain = client.post(CHAT, json=body()).json()["sparsity"]
    dense = client.post(CHAT, json=body(sparsity={"dense": True})).json()["sparsity"]
    assert dense["dense"]
    assert dense["image_tokens_kept"] == dense["image_tokens"] == 144
    assert dense["kv_bytes"] == dense["kv_bytes_dense"]
    assert client.post(CHAT, json=body()).json()["sparsity"]["kv_bytes"] == plain["kv_bytes"]


def test_a_chat_goes_on(client: TestClient, body: Body) -> None:
    messages = body()["messages"]
    messages += [{"role": "assistant", "content": "red"}, {"role": "user", "content": "And now?"}]
    assert client.post(CHAT, json=body(messages=messages)).status_code == 200
    text_only = body(messages=[{"role": "user", "content": "Hello"}], sparsity={"explain": True})
    sparsity = client.post(CHAT, json=text_only).json()["sparsity"]
    assert (sparsity["image_tokens"], sparsity["pictures"]) == (0, [])


def test_an_answer_that_breaks_off_says_so(
    client: TestClient, engine: Engine, body: Body, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("secret")

    monkeypatch.setattr(engine, "_kept", fail)
    answer = client.post(CHAT, json=body(stream=True))
    assert "broke off" in answer.text.split("\n\n")[-2]
    assert "secret" not in answer.text
    monkeypatch.undo()
    assert client.post(CHAT, json=body()).status_code == 200


def test_models_and_health(client: TestClient) -> None:
    assert [model["id"] for model in client.get("/v1/models").json()["data"]] == ["tiny"]
    assert client.get("/health").json()["status"] == "ok"


SYSTEM = [{"role": "system", "content": "x"}, {"role": "user", "content": "y"}]
LONG = [{"role": "user", "content": "word " * 3000}]
WRONG: list[tuple[dict[str, Any], str, str | None]] = [
    ({"messages": []}, "at least one message", "messages"),
    ({"messages": [{"role": "tool", "content": "x"}]}, "needs a role", "messages"),
    ({"messages": [{"role": "user", "content": " "}]}, "is empty", "messages"),
    ({"messages": [{"role": "user", "content": [{"type": "input_audio"}]}]}, "a part must be", "messages"),
    ({"messages": [{"role": "assistant", "content": "x"}]}, "must be the user's", "messages"),
    (
        {"messages": [{"role": "system", "content": "x"}, {"role": "user", "content": "y"}]},
        "system",
        "messages",
    ),
    ({"messages": LONG}, "positions", "messages"),
    ({"max_tokens": 0}, "1 to 24", "max_tokens"),
    ({"max_tokens": True}, "whole number", "max_tokens"),
    ({"temperature": 3}, "0 to 2", "temperature"),
    ({"temperature": "hot"}, "a number", "temperature"),
    ({"n": 2}, "n is not supported", "n"),
    ({"tools": [{}]}, "tools is not supported", "tools"),
    ({"sparsity": {"rate": 1}}, "sparsity has no rate", "sparsity"),
    ({"sparsity": {"image_keep_rate": 0}}, "image_keep_rate is 0", "sparsity"),
    ({"sparsity": 1}, "an object", "sparsity"),
]


@pytest.mark.parametrize(("fields", "said", "param"), WRONG)
@pytest.mark.parametrize("stream", [False, True])
def test_wrong_requests_get_one_line(
    client: TestClient, body: Body, fields: dict[str, Any], said: str, param: str, stream: bool
) -> None:
    answer = client.post(CHAT, json=body(stream=stream) | fields)
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert said in error["message"]
    assert "\n" not in error["message"]
    assert (error["type"], error["param"]) == ("invalid_request_error", param)


PICTURES = [
    ("data:image/png;base64,!!", "base64 is broken"),
    ("data:image/png,abc", "must be data:image"),
    ("data:image/png;base64,", "picture 1: "),
    (RED[:82], "picture 1: "),
    (address(Image.new("L", (200, 200))), "200 x 200 pixels, the server takes 10,000"),
    (address(Image.new("L", (1, 101))), "1 x 101 pixels, a side is over 100 times the other"),
    ("https://example.org/cat.png", "fetches no pictures"),
    ("http://127.0.0.1/cat.png", "fetches no pictures"),
    ("file:///etc/passwd", "fetches no pictures"),
    ("https://[", "address is broken"),
]


@pytest.mark.parametrize(("url", "said"), PICTURES)
def test_pictures_that_are_refused(client: TestClient, body: Body, url: str, said: str) -> None:
    answer = client.post(CHAT, json=body(url=url))
    assert answer.status_code == 400
    assert said in answer.json()["error"]["message"]


def test_too_many_pictures_are_refused(client: TestClient, body: Body) -> None:
    part = {"type": "image_url", "image_url": {"url": RED}}
    answer = client.post(CHAT, json=body(messages=[{"role": "user", "content": [part] * 3}]))
    assert "3 pictures, the server takes 2" in answer.json()["error"]["message"]


@pytest.mark.parametrize("data", [b"", b"{", b"[" * 50_000, b"null", b'"x"', b"\xff"])
def test_a_body_that_is_no_object_is_refused(client: TestClient, data: bytes) -> None:
    assert client.post(CHAT, content=data).status_code == 400


def test_a_long_body_is_refused_with_and_without_a_length(client: TestClient) -> None:
    data = b" " * (LIMITS.body_bytes + 1)
    assert client.post(CHAT, content=data).status_code == 413
    assert client.post(CHAT, content=iter([data])).status_code == 413


@pytest.mark.parametrize("length", [b"1" * 5000, b"x", b"-1"])
def test_a_length_that_is_no_number_is_refused(client: TestClient, length: bytes) -> None:
    assert client.post(CHAT, content=b"{}", headers={b"content-length": length}).status_code == 413


def test_a_client_that_leaves_within_its_body_is_no_fault(
    engine: Engine, caplog: pytest.LogCaptureFixture
) -> None:
    messages = [{"type": "http.request", "body": b"{", "more_body": True}, {"type": "http.disconnect"}]

    async def receive() -> Any:
        return messages.pop(0)

    async def send(message: Any) -> None:
        pass

    scope = {"type": "http", "method": "POST", "path": CHAT, "headers": [], "query_string": b""}
    asyncio.run(build(engine, LIMITS)(scope, receive, send))  # raises nothing
    assert not caplog.records


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [("GET", CHAT, 405), ("GET", "/v1/files", 404), ("POST", "/", 405), ("GET", "/static/../app.py", 404)],
)
def test_what_is_not_served_is_said_in_the_same_form(
    client: TestClient, method: str, path: str, status: int
) -> None:
    answer = client.request(method, path)
    assert answer.status_code == status
    assert answer.json()["error"]["code"] == status


def test_another_model_is_not_here(client: TestClient, body: Body) -> None:
    assert client.post(CHAT, json=body(model="gpt")).status_code == 404


def test_the_key_is_asked_for(engine: Engine, body: Body) -> None:
    client = TestClient(build(engine, LIMITS, key="secret"))
    assert client.get("/v1/models").status_code == 401
    assert client.get("/v1/models", headers={"Authorization": "Bearer wrong"}).status_code == 401
    assert client.get("/v1/models", headers={"Authorization": "Bearer secret"}).status_code == 200
    assert client.get("/").status_code == client.get("/health").status_code == 200


def test_hosts_are_fetched_from_only_if_named_and_public(monkeypatch: pytest.MonkeyPatch) -> None:
    from dynamic_llava.page import pictures
    from dynamic_llava.page.errors import Refused

    monkeypatch.setattr(
        pictures.socket, "getaddrinfo", lambda *_, **__: [(2, 1, 6, "", ("169.254.169.254", 443))]
    )
    limits = Limits(picture_hosts=("inner.example",))
    with pytest.raises(Refused, match=r"inner\.example could not be reached"):
        pictures.read_picture("https://inner.example/cat.png", 1, limits)


def test_the_page_loads_nothing_from_elsewhere(client: TestClient) -> None:
    page = client.get("/")
    assert "default-src 'self'" in page.headers["content-security-policy"]
    assert "http://" not in page.text
    assert "https://" not in page.text
    for name in ("page.js", "page.css"):
        assert client.get(f"/static/{name}").status_code == 200


def test_a_full_server_says_so(engine: Engine, body: Body) -> None:
    import threading

    from dynamic_llava.page.chat import read_chat
    from dynamic_llava.page.errors import Refused

    is_gone, ended = threading.Event(), threading.Semaphore(0)
    chat = read_chat(body(), LIMITS)
    hold = threading.Event()
    for _ in range(LIMITS.waiting + 1):
        engine.ask(chat, lambda text: hold.wait(10) and None, lambda answer: ended.release(), is_gone)
    with pytest.raises(Refused, match="busy"):
        engine.ask(chat, lambda text: None, lambda answer: None, is_gone)
    is_gone.set()
    hold.set()
    for _ in range(LIMITS.waiting + 1):
        assert ended.acquire(timeout=30)
