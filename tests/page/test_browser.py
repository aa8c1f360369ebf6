"""The page in headless Chromium: by mouse, by keyboard alone, on a narrow screen, in the dark."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from tests.page import browsing
from tests.page.browsing import done

from dynamic_llava.page.engine import Engine
from dynamic_llava.page.limits import Limits

uvicorn = pytest.importorskip("uvicorn", reason="uvicorn is not installed; the extra serve has it")
playwright = pytest.importorskip(
    "playwright.sync_api", reason="playwright is not installed: pip install playwright"
)
pytestmark = pytest.mark.skipif(browsing.CHROMIUM is None, reason="no Chromium is installed")


@pytest.fixture(scope="module")
def address(engine: Engine) -> Iterator[str]:
    from dynamic_llava.page.app import build

    app = build(engine, Limits(new_tokens=24))
    server = uvicorn.Server(uvicorn.Config(app, port=0, lifespan="off", log_level="error"))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.05)
    yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    server.should_exit = True
    thread.join()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with browsing.chromium() as made:
        yield made


@pytest.fixture(params=browsing.SIZES, ids=browsing.NAMES)
def page(request: pytest.FixtureRequest, browser: Any, address: str) -> Iterator[Any]:
    with browsing.opened(browser, address, request.param, "tiny") as made:
        yield made


@pytest.fixture(scope="module")
def picture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("pictures") / "red.png"
    Image.new("RGB", (40, 40), (255, 0, 0)).save(path)
    return path


def test_a_picture_is_asked_and_its_kept_patches_are_lit(page: Any, picture: Path) -> None:
    page.set_input_files("#file", picture)
    page.fill("#image-rate", "25")
    page.click("#send")
    done(page, 1)
    playwright.expect(page.locator("canvas")).to_have_attribute("data-drawn", "36")
    playwright.expect(page.locator("canvas")).to_have_attribute(
        "aria-label", "Picture 1: 36 of 144 patches kept"
    )
    playwright.expect(page.locator("tbody tr").first).to_have_text("Image tokens36144")
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")  # nothing sticks out


def test_dense_and_side_by_side(page: Any, picture: Path) -> None:
    page.set_input_files("#file", picture)
    page.check("#both")
    page.click("#send")
    done(page, 2)
    assert page.locator(".answer h2").all_text_contents() == ["Sparse", "Dense"]
    page.click("#new")
    page.set_input_files("#file", picture)
    page.fill("#question", "What is there?")
    page.check("#dense")
    assert page.is_disabled("#image-rate")
    page.click("#send")
    done(page, 1)
    playwright.expect(page.locator("tbody tr").first).to_have_text("Image tokens144144")


def test_it_works_by_keyboard_alone(page: Any) -> None:
    page.focus("#question")
    page.keyboard.press("Control+a")
    page.keyboard.type("Hello")
    page.keyboard.press("Tab")  # to the slider
    page.keyboard.press("ArrowRight")
    assert page.text_content("#image-rate-said") == "25 %"
    page.keyboard.press("Shift+Tab")
    page.keyboard.press("Enter")
    done(page, 1)
    assert page.evaluate("document.activeElement.id") == "question"


def test_an_error_is_said(page: Any) -> None:
    page.fill("#question", "word " * 3000)
    page.click("#send")
    playwright.expect(page.locator("#status")).to_contain_text("too many for the model", timeout=60_000)
    assert page.is_enabled("#send")
