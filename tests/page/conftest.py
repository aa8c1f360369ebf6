"""The server on a tiny checkpoint, and what its clients send."""

from __future__ import annotations

import base64
from collections.abc import Callable, Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

pytest.importorskip("starlette", reason="starlette is not installed; the extra serve has it")
pytest.importorskip("httpx", reason="httpx is not installed; the extra dev has it")

from starlette.testclient import TestClient

import dynamic_llava
from dynamic_llava.page.app import build
from dynamic_llava.page.engine import Engine
from dynamic_llava.page.limits import Limits

LIMITS = Limits(body_bytes=100_000, pictures=2, pixels=10_000, new_tokens=24, waiting=2)


@pytest.fixture(scope="session")
def engine(checkpoint: Path) -> Iterator[Engine]:
    model, processor = dynamic_llava.load(checkpoint, device="cpu")
    made = Engine(model, processor, "tiny", LIMITS.waiting)
    yield made
    made.close()


@pytest.fixture(scope="session")
def client(engine: Engine) -> TestClient:
    return TestClient(build(engine, LIMITS))  # without its lifespan, which would close the engine


def address(image: Image.Image, kind: str = "PNG") -> str:
    data = BytesIO()
    image.save(data, kind)
    return f"data:image/{kind.lower()};base64," + base64.b64encode(data.getvalue()).decode()


RED = address(Image.new("RGB", (40, 40), (255, 0, 0)))


@pytest.fixture
def body() -> Callable[..., dict[str, Any]]:
    """Make the body of a chat with one picture."""

    def make(text: str = "What is there?", url: str = RED, **fields: Any) -> dict[str, Any]:
        content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": text}]
        return {
            "model": "tiny",
            "messages": [{"role": "user", "content": content}],
            "max_tokens": 12,
        } | fields

    return make
