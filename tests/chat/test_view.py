"""The overlay's pixels, and the marks on output words."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from rich.style import Style
from transformers import LlavaProcessor

from dynamic_llava.chat import view

SIDE = 4
CELL = view.PANEL // SIDE


def pixel(sheet: Image.Image, panel: int, patch: int) -> tuple[int, ...]:
    """The colour in the middle of one patch of one panel."""
    row, column = divmod(patch, SIDE)
    left = view.MARGIN + panel * (view.PANEL + view.MARGIN)
    return sheet.getpixel((left + column * CELL + CELL // 2, view.MARGIN + row * CELL + CELL // 2))


def test_overlay_darkens_dropped_patches_and_colours_scores() -> None:
    picture = Image.new("RGB", (40, 20), (10, 200, 30))
    seen = Image.new("RGB", (96, 96), "white")
    kept = [0, 6, 15]
    scores = np.random.default_rng(0).permutation(SIDE * SIDE).tolist()
    sheet = view.overlay(picture, seen, kept, scores)

    assert sheet.size == (4 * view.MARGIN + 3 * view.PANEL, 2 * view.MARGIN + view.PANEL + view.CAPTION)
    dark = round(255 * view.DROPPED_BRIGHTNESS)
    for patch in range(SIDE * SIDE):
        assert pixel(sheet, 1, patch) == ((255,) * 3 if patch in kept else (dark,) * 3)
    for score, colour in ((0, view.VIRIDIS[0]), (SIDE * SIDE - 1, view.VIRIDIS[-1])):
        expected = [round(0.7 * channel + 0.3 * 255) for channel in colour]
        assert pixel(sheet, 2, scores.index(score)) == pytest.approx(expected, abs=1)
    assert pixel(sheet, 0, 5) == pixel(sheet, 0, 10) == (10, 200, 30)  # wide: white bands above and below
    assert pixel(sheet, 0, 1) == pixel(sheet, 0, 14) == (255, 255, 255)


@pytest.mark.parametrize("side", [3, 7, 12, 24])
def test_patches_cover_the_panel_in_order(side: int) -> None:
    grid = view._grid(np.arange(side * side, dtype=float), side)
    assert grid.shape == (view.PANEL, view.PANEL)
    assert np.array_equal(np.unique(grid), np.arange(side * side))
    assert np.array_equal(grid, np.sort(grid, axis=1))
    assert np.array_equal(grid, np.sort(grid, axis=0))


def test_overlay_of_two_pictures_is_refused() -> None:
    square = Image.new("RGB", (8, 8))
    with pytest.raises(ValueError, match="32 image tokens form no square grid"):
        view.overlay(square, square, [0], [0.0] * 32)


def test_failed_write_leaves_no_file(tmp_path: Path) -> None:
    path = tmp_path / "new" / "overlay.png"
    with pytest.raises(OSError, match="cannot write mode"):
        view.save_overlay(Image.new("F", (8, 8)), path)
    assert list(path.parent.iterdir()) == []


def test_written_overlay_is_the_sheet(tmp_path: Path) -> None:
    sheet = Image.fromarray(np.random.default_rng(0).integers(0, 256, (9, 7, 3), dtype=np.uint8))
    path = tmp_path / "overlay.png"
    view.save_overlay(sheet, path)
    assert Image.open(path).tobytes() == sheet.tobytes()
    assert list(tmp_path.iterdir()) == [path]


def test_picture_as_the_tower_saw_it(processor: LlavaProcessor) -> None:
    noise_HWC = np.random.default_rng(0).integers(0, 256, (96, 96, 3), dtype=np.uint8)
    picture = Image.fromarray(noise_HWC)
    pixels_CHW = processor.image_processor(picture, return_tensors="pt")["pixel_values"][0]
    seen_HWC = np.asarray(view.as_seen(processor, pixels_CHW))
    assert np.abs(seen_HWC.astype(int) - noise_HWC).max() <= 1


def test_pieces_join_to_the_text(processor: LlavaProcessor) -> None:
    text = "a small teal star, above the caf\u00e9"
    tokens = [
        *processor.tokenizer(text, add_special_tokens=False)["input_ids"],
        processor.tokenizer.eos_token_id,
    ]
    parts = view.pieces(processor, tokens)
    assert len(parts) == len(tokens)
    assert "".join(parts) == text
    assert parts[-1] == ""


def test_dropped_words_are_struck_without_their_space() -> None:
    text = view.marked(["one", " two", " three", " four"], [True, False, True])
    assert text.plain == "one two three four"
    struck = [text.plain[span.start : span.end] for span in text.spans if Style.parse(str(span.style)).strike]
    assert struck == ["two"]


def test_dropped_words_are_marked_without_styles() -> None:
    text = view.marked(["a", " tr", "iangle", " and", ""], [True, False, False, True], plain=True)
    assert text.plain == "a ~~triangle~~ and"
    assert text.spans == []
