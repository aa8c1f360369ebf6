"""The demo: its JSON fields, its overlays, and numbers that agree with each other."""

from __future__ import annotations

import importlib.resources
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

import pytest
from PIL import Image
from tests.command_line import Command, refused
from transformers import LlavaForConditionalGeneration, LlavaProcessor, ProcessorMixin

import dynamic_llava
from dynamic_llava.chat import demo
from dynamic_llava.data import Sample, scenes

FIELDS = {
    "picture": str, "question": str, "answer": str, "answer_dense": str, "expected": str,
    "image_tokens": int, "image_tokens_kept": int, "output_tokens": int, "output_tokens_kept": int,
    "kv_bytes": int, "kv_bytes_dense": int, "prefill_flops": int, "prefill_flops_dense": int, "overlay": str,
}  # fmt: skip
WORDS = 10
ASSETS = importlib.resources.files("dynamic_llava") / "assets"


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let an untrained model, which never ends, stop early."""
    monkeypatch.setattr(demo, "MAX_NEW_TOKENS", WORDS)


def test_bundled_requests() -> None:
    asked = demo.requests()
    assert all((ASSETS / request.picture).is_file() for request in asked)
    assert sum(request.question == scenes.DESCRIBE for request in asked) >= 2
    assert {request.picture.split("-")[0] for request in asked} == {"easy", "scene"}


def test_bundled_scenes_are_held_out() -> None:
    samples = [scenes.make(index, "heldout") for index in range(110)]
    for request in demo.requests():
        if request.picture.startswith("scene"):
            assert request.expected == _answer(samples, request)


def _answer(samples: list[Sample], request: demo.Request) -> str:
    with importlib.resources.as_file(ASSETS / request.picture) as path:
        pixels = Image.open(path).convert("RGB").tobytes()
    (sample,) = [sample for sample in samples if sample.open_image().tobytes() == pixels]
    (turn,) = [turn for turn in sample.turns if turn.question == request.question]
    return turn.answer


@pytest.mark.usefixtures("short")
def test_json(command: Command, checkpoint: Path, tmp_path: Path) -> None:
    outcome = command("demo", "--json", "--model", checkpoint, "--out", tmp_path / "out")
    assert outcome.code == 0
    assert outcome.stdout.count("\n") == 1
    items = outcome.json()["items"]
    assert len(items) == len(demo.requests())
    for item in items:
        assert FIELDS.items() <= {name: type(value) for name, value in item.items()}.items()
        assert (item["image_tokens"], item["image_tokens_kept"]) == (144, 28)
        assert item["output_tokens"] == WORDS - 1 == len(item["output_words_kept"])
        assert item["output_tokens_kept"] == sum(item["output_words_kept"])
        assert item["kv_bytes"] < item["kv_bytes_dense"]
        assert item["prefill_flops"] < item["prefill_flops_dense"]
        assert "".join(item["output_words"]).strip() == item["answer"]
        with Image.open(item["overlay"]) as sheet:
            assert sheet.format == "PNG"
            assert sheet.width > 3 * sheet.height / 2
    overlays = {item["overlay"] for item in items}
    assert overlays == {str(path) for path in (tmp_path / "out").iterdir()}
    assert len(overlays) == len(items)
    assert any(item["output_tokens_kept"] < item["output_tokens"] for item in items)


@pytest.mark.usefixtures("short")
def test_shown_in_a_terminal(
    command: Command, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "140")
    outcome = command("demo", "--model", checkpoint, "--out", tmp_path)
    assert outcome.code == 0
    assert "28 of 144 (19%)" in outcome.stdout
    assert "~~word~~ = its K/V was dropped" in outcome.stdout
    assert all(request.picture in outcome.stdout for request in demo.requests())
    assert "dense" in outcome.stdout
    assert "sparse" in outcome.stdout


@pytest.mark.usefixtures("short")
def test_narrow_terminal_cuts_nothing_off(
    command: Command, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    table = command("demo", "--model", checkpoint, "--out", tmp_path).stdout.partition("kept and saved")[2]
    assert table.count("easy-vqa-1") == 2
    assert "…" not in table


@pytest.mark.usefixtures("short")
def test_dense_answer_is_the_stock_answer(
    command: Command, checkpoint: Path, stock_checkpoint: Path, tmp_path: Path
) -> None:
    item = command("demo", "--json", "--model", checkpoint, "--out", tmp_path).json()["items"][0]
    with importlib.resources.as_file(ASSETS / item["picture"]) as picture:
        ask = (
            "--image",
            picture,
            "--prompt",
            item["question"],
            "--max-new-tokens",
            WORDS,
            "--json",
            "--model",
        )
        dense = command("generate", *ask, stock_checkpoint).json()["answer"]
        sparse = command("generate", *ask, checkpoint).json()["answer"]
    assert (item["answer_dense"], item["answer"]) == (dense, sparse)
    assert dense != sparse


@pytest.mark.usefixtures("short")
def test_model_that_keeps_all_image_tokens_is_refused(
    model: LlavaForConditionalGeneration, processor: LlavaProcessor, tmp_path: Path
) -> None:
    model.sparsifier.config.image_keep_rate = 1.0
    with pytest.raises(ValueError, match="keeps all image tokens"):
        list(demo.run(model, processor, demo.requests()[:1], tmp_path))
    assert list(tmp_path.iterdir()) == []


@pytest.fixture(scope="module")
def nano_items(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What the demo shows with the bundled model."""
    model, processor = dynamic_llava.load("nano")
    items = demo.run(model, cast(ProcessorMixin, processor), demo.requests(), tmp_path_factory.mktemp("nano"))
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


def test_demo_of_a_model_without_sparsifier(command: Command, stock_checkpoint: Path, tmp_path: Path) -> None:
    line = refused(command, "demo", "--model", stock_checkpoint, "--out", tmp_path / "out")
    assert "no sparsifier" in line
    assert not (tmp_path / "out").exists()


def test_demo_out_is_a_file(command: Command, checkpoint: Path, picture: Path) -> None:
    before = picture.read_bytes()
    assert str(picture) in refused(command, "demo", "--model", checkpoint, "--out", picture)
    assert picture.read_bytes() == before
