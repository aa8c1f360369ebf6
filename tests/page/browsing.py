"""The page in headless Chromium, for tests of both engines."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
OPTIONS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"]
OPTIONS += ["--disable-background-networking", "--disable-component-update"]
SIZES = [(1100, "light"), (360, "dark")]
NAMES = ["wide", "narrow"]


@contextmanager
def chromium() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as started:
        made = started.chromium.launch(executable_path=CHROMIUM, args=OPTIONS)
        yield made
        made.close()


@contextmanager
def opened(browser: Any, address: str, size: tuple[int, str], model: str) -> Iterator[Any]:
    """Open the page of a server; no error may be left on it."""
    from playwright.sync_api import expect

    width, scheme = size
    context = browser.new_context(viewport={"width": width, "height": 800}, color_scheme=scheme)
    made = context.new_page()
    errors: list[str] = []
    made.on("pageerror", lambda error: errors.append(str(error)))
    made.goto(address)
    expect(made.locator("#engine")).to_contain_text(f"Model {model}")
    yield made
    assert errors == []
    context.close()


def done(page: Any, answers: int) -> None:
    """Wait until so many answers are complete, and are shown with what was kept of them."""
    from playwright.sync_api import expect

    expect(page.locator("#status")).to_have_text("Done.", timeout=60_000)
    expect(page.locator(".answer table:visible")).to_have_count(answers)
