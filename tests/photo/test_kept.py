"""The boxes marked by hand, and the share of patches that lie on them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from evidence.photo import kept
from PIL import Image

import dynamic_llava


def test_fifty_pictures_are_marked_with_fractions() -> None:
    pictures = json.loads(kept.BOXES.read_text(encoding="utf-8"))["pictures"]
    assert len({picture["image"] for picture in pictures}) == 50
    for picture in pictures:
        assert picture["boxes"]
        for box in picture["boxes"]:
            left, top, right, bottom = box["box"]
            assert 0 <= left < right <= 1, (picture["image"], box)
            assert 0 <= top < bottom <= 1, (picture["image"], box)


def test_a_patch_lies_on_a_box_if_its_middle_does() -> None:
    flags = kept.on_boxes([{"box": [0.0, 0.0, 0.5, 0.5]}, {"box": [0.8, 0.8, 1.0, 1.0]}], 16)
    assert flags.reshape(4, 4).int().tolist() == [[1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 0, 0], [0, 0, 0, 1]]


def test_ratio_and_its_interval() -> None:
    result = kept.ratio([0.6, 0.4, 0.5], [0.3, 0.2, 0.25])
    assert result["ratio"] == pytest.approx(2.0)
    assert result["interval_95"] == pytest.approx([2.0, 2.0])
    low, high = kept.ratio([0.9, 0.1, 0.5], [0.3, 0.3, 0.3])["interval_95"]
    assert low < 5 / 3 < high


@pytest.mark.parametrize("truth", [1.0, 1.4])
def test_the_interval_covers_the_true_ratio_as_often_as_it_says(truth: float) -> None:
    draw, covered = np.random.default_rng(1), 0
    for _ in range(100):
        area = draw.uniform(0.1, 0.6, 50)
        # 51 kept patches lie on the boxes by chance, more or less often than the area says, by the picture.
        chance = area * truth * draw.uniform(0.7, 1.3, 50)
        shares = draw.binomial(51, chance.clip(0, 1)) / 51
        low, high = kept.ratio(shares.tolist(), area.tolist())["interval_95"]
        covered += low <= truth <= high
    assert 87 <= covered <= 100


@pytest.fixture
def arguments(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A command line for three pictures with a box over their left half."""
    pictures = [{"image": f"{color}.png", "boxes": [{"box": [0, 0, 0.5, 1]}]} for color in ("red", "blue")]
    for picture in pictures:
        Image.new("RGB", (60, 40), picture["image"].removesuffix(".png")).save(tmp_path / picture["image"])
    boxes = tmp_path / "boxes.json"
    boxes.write_text(json.dumps({"pictures": pictures}))
    monkeypatch.setattr(kept, "BOXES", boxes)
    options = ["--rates", "0.1", "0.5", "--dtype", "float32", "--output", str(tmp_path / "kept.json")]
    return ["kept", str(checkpoint), str(tmp_path), *options]


def test_every_policy_is_measured_at_every_rate(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.argv", arguments)
    kept.main()
    results = json.loads((tmp_path / "kept.json").read_text())["results"]
    assert results.keys() == {f"{policy} {rate}" for policy in kept.POLICIES for rate in (0.1, 0.5)}
    for result in results.values():
        assert result["area_of_boxes"] == 0.5
        assert result["pictures"].keys() == {"red.png", "blue.png"}
        shares = [share for share, _ in result["pictures"].values()]
        assert result["kept_on_boxes"] == pytest.approx(sum(shares) / 2, abs=1e-4)
    assert results["uniform 0.5"]["ratio"] == pytest.approx(1.0, abs=0.1)


def test_what_is_measured_is_where_the_kept_patches_lie(checkpoint: Path, arguments: list[str]) -> None:
    model, processor = dynamic_llava.load(checkpoint)
    config = model.sparsifier.config
    found = kept.measure(model, processor, Path(arguments[2]), [0.1])["learned 0.1"]
    assert model.sparsifier.config is config
    model.sparsifier.config.image_keep_rate = 0.1
    picture = Image.open(Path(arguments[2]) / "blue.png")
    kept.ask(model, processor, kept.CAPTION_REQUESTS[0], [picture], 1)
    columns = model.sparsifier.report.image_kept[0] % 12
    assert found["pictures"]["blue.png"] == (round((columns < 6).float().mean().item(), 4), 0.5)


def test_a_dense_model_is_refused(
    arguments: list[str],
    stock_checkpoint: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("sys.argv", [arguments[0], str(stock_checkpoint), *arguments[2:]])
    with pytest.raises(SystemExit) as exited:
        kept.main()
    assert exited.value.code == 2
    assert "has no sparsifier" in capsys.readouterr().err
