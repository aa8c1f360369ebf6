"""The page beside vLLM, and what it asks for: which tokens of an answer were kept."""

from __future__ import annotations

import base64
import json
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("vllm", reason="vLLM is not installed; make check-vllm installs it")

from evidence.serving import Chat
from evidence.serving_process import Server
from tests.page import browsing

import dynamic_llava
from dynamic_llava.chat.asking import ask
from dynamic_llava.core.report import Report
from evidence import serving, serving_process

KEPT = 0.3


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    log = tmp_path_factory.mktemp("server") / "log"
    with serving_process.running(serving_process.vllm_line(), log) as made:
        yield made


@pytest.fixture(scope="module")
def chat() -> Chat:
    drawn = serving.draw(40, seed=1)
    several = next(chat for chat in drawn if len(chat.pictures) == 2)
    return replace(several, text="Describe the picture.", longest=60, sparsity={"image_keep_rate": KEPT})


def get(address: str, body: dict[str, Any] | None = None) -> Any:
    data = None if body is None else json.dumps(body).encode()
    asked = urllib.request.Request(address, data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(asked, timeout=60) as answer:
        return json.load(answer)


def answer_of(server: Server, chat: Chat, **sparsity: Any) -> dict[str, Any]:
    body = {"model": "nano", "messages": serving.messages(chat), "max_tokens": chat.longest, "temperature": 0}
    found: dict[str, Any] = get(
        f"{server.address}/v1/chat/completions", body | {"sparsity": chat.sparsity | sparsity}
    )
    return found


def alone(chat: Chat) -> Report:
    """Return what ``generate`` keeps of the same chat."""
    model, processor = dynamic_llava.load("nano", dtype=torch.float32)
    sparsifier: Any = model.sparsifier
    sparsifier.config = replace(sparsifier.config, **chat.sparsity)
    found = ask(model, processor, chat.text, chat.pictures, chat.longest).report
    assert found is not None
    return found


def test_it_tells_what_generate_keeps(server: Server, chat: Chat) -> None:
    answer = answer_of(server, chat, explain=True)
    told = get(f"{server.address}/sparsity/{answer['id']}")
    expected = alone(chat)
    assert [picture["kept"] for picture in told["pictures"]] == [
        flags.nonzero()[:, 0].tolist() for flags in expected.image_flags[0]
    ]
    assert told["pictures"][0]["side"] ** 2 == told["pictures"][0]["tokens"]
    kept = expected.text_kept[0].tolist()
    assert told["output_kept"][: len(kept)] == kept
    assert 0 < sum(kept) < len(kept)
    numbers = answer["kv_transfer_params"]["sparsity"]
    assert {name: told[name] for name in numbers} == numbers


def test_completions_are_found_too(server: Server) -> None:
    body = {"model": "nano", "prompt": "The picture shows", "max_tokens": 8, "sparsity": {"explain": True}}
    answer = get(f"{server.address}/v1/completions", body)
    assert get(f"{server.address}/sparsity/{answer['id']}")["image_tokens"] == 0


def test_what_was_not_asked_for_is_not_known(server: Server, chat: Chat) -> None:
    for name in (answer_of(server, chat)["id"], "chatcmpl-1", "%2e%2e"):
        with pytest.raises(urllib.error.HTTPError) as raised:
            get(f"{server.address}/sparsity/{name}")
        assert raised.value.code == 404


def test_a_picture_is_shown_as_the_tower_sees_it(server: Server, chat: Chat) -> None:
    url = serving.messages(chat)[0]["content"][0]["image_url"]["url"]
    seen = get(f"{server.address}/seen", {"url": url})["seen"]
    assert base64.b64decode(seen.partition(",")[2]).startswith(b"\x89PNG")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    pytest.importorskip("playwright", reason="playwright is not installed: pip install playwright")
    if browsing.CHROMIUM is None:
        pytest.skip("no Chromium is installed")
    with browsing.chromium() as made:
        yield made


@pytest.fixture(params=browsing.SIZES, ids=browsing.NAMES)
def page(request: pytest.FixtureRequest, browser: Any, server: Server) -> Iterator[Any]:
    with browsing.opened(browser, server.address, request.param, "nano") as made:
        yield made


@pytest.fixture
def picture(chat: Chat, tmp_path: Path) -> Path:
    path = tmp_path / "picture.png"
    chat.pictures[0].save(path)
    return path


def test_kept_patches_are_lit_and_forgotten_words_greyed(page: Any, picture: Path) -> None:
    from playwright.sync_api import expect

    page.set_input_files("#file", picture)
    page.fill("#image-rate", "25")
    page.click("#send")
    browsing.done(page, 1)
    expect(page.locator("canvas")).to_have_attribute("data-drawn", "36")
    expect(page.locator("tbody tr").first).to_have_text("Image tokens36144")
    assert page.locator(".forgotten").count() > 0
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")


def test_dense_and_sparse_side_by_side(page: Any, picture: Path) -> None:
    page.set_input_files("#file", picture)
    page.check("#both")
    page.click("#send")
    browsing.done(page, 2)
    assert page.locator(".answer h2").all_text_contents() == ["Sparse", "Dense"]
    rows = page.locator("tbody").evaluate_all("all => all.map((one) => one.rows[0].cells[1].textContent)")
    assert sorted(map(int, rows)) == [28, 144]


def test_it_works_by_keyboard_alone(page: Any) -> None:
    page.focus("#question")
    page.keyboard.press("Control+a")
    page.keyboard.type("Hello")
    page.keyboard.press("Enter")
    browsing.done(page, 1)
    assert page.evaluate("document.activeElement.id") == "question"
