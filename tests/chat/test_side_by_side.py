"""The bundled requests, and what the bundled model answers to them, dense and sparse."""

from __future__ import annotations

import importlib.resources
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

import pytest
from PIL import Image
from transformers import LlavaForConditionalGeneration, LlavaProcessor, ProcessorMixin

import dynamic_llava
from dynamic_llava.chat import side_by_side
from dynamic_llava.data import Sample, scenes

ASSETS = importlib.resources.files("dynamic_llava") / "assets"


def test_bundled_requests() -> None:
    asked = side_by_side.requests()
    assert all((ASSETS / request.picture).is_file() for request in asked)
    assert sum(request.question == scenes.DESCRIBE for request in asked) >= 2
    assert {request.picture.split("-")[0] for request in asked} == {"easy", "scene"}


def test_bundled_scenes_are_held_out() -> None:
    samples = [scenes.make(index, "heldout") for index in range(110)]
    for request in side_by_side.requests():
        if request.picture.startswith("scene"):
            assert request.expected == _answer(samples, request)


def _answer(samples: list[Sample], request: side_by_side.Request) -> str:
    with importlib.resources.as_file(ASSETS / request.picture) as path:
        pixels = Image.open(path).convert("RGB").tobytes()
    (sample,) = [sample for sample in samples if sample.open_image().tobytes() == pixels]
    (turn,) = [turn for turn in sample.turns if turn.question == request.question]
    return turn.answer


def test_model_that_keeps_all_image_tokens_is_refused(
    model: LlavaForConditionalGeneration, processor: LlavaProcessor, tmp_path: Path
) -> None:
    model.sparsifier.config.image_keep_rate = 1.0
    with pytest.raises(ValueError, match="keeps all image tokens"):
        list(side_by_side.run(model, processor, side_by_side.requests()[:1], tmp_path))
    assert list(tmp_path.iterdir()) == []


@pytest.fixture(scope="module")
def nano_items(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What the demo shows with the bundled model."""
    model, processor = dynamic_llava.load("nano")
    items = side_by_side.run(
        model, cast(ProcessorMixin, processor), side_by_side.requests(), tmp_path_factory.mktemp("nano")
    )
    return [asdict(item) for item in items]


def test_nano_answers_right(nano_items: list[dict[str, Any]]) -> None:
    short = [item for item in nano_items if item["question"] != scenes.DESCRIBE]
    assert [item["answer"] for item in short] == [item["expected"] for item in short]


def test_nano_answers_right_dense(nano_items: list[dict[str, Any]]) -> None:
    short = [item for item in nano_items if item["question"] != scenes.DESCRIBE]
    assert [item["answer_dense"] for item in short] == [item["expected"] for item in short]


def test_nano_drops_image_and_output_tokens(nano_items: list[dict[str, Any]]) -> None:
    for item in nano_items:
        assert item["image_tokens_kept"] <= 0.2 * item["image_tokens"]
        assert item["kv_bytes"] < item["kv_bytes_dense"]
        if item["question"] == scenes.DESCRIBE:
            assert 0 < item["output_tokens_kept"] < item["output_tokens"]
