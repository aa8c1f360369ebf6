"""``dynamic-llava demo``: its JSON fields, its overlays, and numbers that agree with each other."""

from __future__ import annotations

import importlib.resources
from pathlib import Path

import pytest
from PIL import Image
from tests.command_line import Command, refused

from dynamic_llava import photo
from dynamic_llava.chat import side_by_side
from dynamic_llava.checkpoints import source

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
    monkeypatch.setattr(side_by_side, "MAX_NEW_TOKENS", WORDS)


@pytest.mark.usefixtures("short")
def test_json(command: Command, checkpoint: Path, tmp_path: Path) -> None:
    outcome = command("demo", "--json", "--model", checkpoint, "--out", tmp_path / "out")
    assert outcome.code == 0
    assert outcome.stdout.count("\n") == 1
    items = outcome.json()["items"]
    assert len(items) == len(side_by_side.requests())
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
    assert all(request.picture in outcome.stdout for request in side_by_side.requests())
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


def test_demo_of_a_model_without_sparsifier(command: Command, stock_checkpoint: Path, tmp_path: Path) -> None:
    line = refused(command, "demo", "--model", stock_checkpoint, "--out", tmp_path / "out")
    assert "no sparsifier" in line
    assert not (tmp_path / "out").exists()


def test_demo_out_is_a_file(command: Command, checkpoint: Path, picture: Path) -> None:
    before = picture.read_bytes()
    assert str(picture) in refused(command, "demo", "--model", checkpoint, "--out", picture)
    assert picture.read_bytes() == before


def test_bad_out_is_refused_before_a_model_is_loaded(command: Command, tmp_path: Path) -> None:
    (tmp_path / "taken").touch()
    line = refused(command, "demo", "--model", "no-such-model", "--out", tmp_path / "taken" / "out")
    assert f"--out: {tmp_path / 'taken'} is no folder that can be written to" in line


@pytest.mark.usefixtures("short")
@pytest.mark.parametrize("predictors", [True, False])
def test_photographs_are_shown_where_photo_is_installed(
    predictors: bool,
    command: Command,
    checkpoint: Path,
    stock_checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(photo, "is_installed", lambda: True)
    monkeypatch.setitem(source.OWN, "nano", lambda: checkpoint)
    monkeypatch.setitem(source.OWN, "photo", lambda: checkpoint if predictors else stock_checkpoint)
    outcome = command("demo", "--json", "--out", tmp_path)
    assert outcome.code == 0
    items = outcome.json()["items"]
    photographs = [item for item in items if item["expected"] is None]
    assert len(items) == len(side_by_side.requests()) + len(photographs)
    names = ["astronaut.jpg", "chelsea.jpg", "coffee.jpg", "rocket.jpg"]
    assert [item["picture"] for item in photographs] == (names if predictors else [])
    assert ("no predictors, so no photographs are shown" in outcome.stderr) is not predictors
    assert len({item["overlay"] for item in items}) == len(items)
    named = command("demo", "--json", "--out", tmp_path, "--model", checkpoint).json()["items"]
    assert len(named) == len(side_by_side.requests())
