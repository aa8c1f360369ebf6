"""The table of photo: its cells, its intervals, and that it goes on where it was stopped."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from evidence.photo import cells, table
from evidence.photo.bootstrap import difference, mean_of
from evidence.photo.cells import Cell, Measuring, asked, plan
from PIL import Image
from transformers import LlavaForConditionalGeneration, LlavaProcessor

import dynamic_llava


def examples(values: Any, names: Any = None) -> list[dict[str, Any]]:
    names = range(len(values)) if names is None else names
    return [{"image": f"{name}", "score": value} for name, value in zip(names, values, strict=True)]


def test_the_interval_of_a_mean_is_that_of_its_standard_error() -> None:
    values = np.random.default_rng(1).normal(5.0, 2.0, 400)
    found = mean_of(examples(values), "score")
    reach = 1.96 * values.std() / 400**0.5
    assert found["mean"] == pytest.approx(values.mean(), abs=1e-4)
    assert found["interval_95"] == pytest.approx([values.mean() - reach, values.mean() + reach], abs=0.02)


def test_differences_are_paired_by_picture() -> None:
    base = np.random.default_rng(2).normal(50.0, 20.0, 100)
    found = difference(examples(base + 1), examples(base), "score")
    assert found["interval_95"] == [1.0, 1.0]
    assert found["percent"] == pytest.approx(100 / base.mean(), abs=1e-3)
    low, high = found["percent_interval_95"]
    assert low < found["percent"] < high


def test_scores_of_one_picture_are_drawn_together() -> None:
    values = np.random.default_rng(3).normal(0.0, 1.0, 50)
    once = mean_of(examples(values), "score")
    thrice = mean_of(examples(np.repeat(values, 3), np.repeat(np.arange(50), 3)), "score")
    assert thrice == once


def test_the_interval_covers_the_truth_as_often_as_it_says() -> None:
    draw, covered = np.random.default_rng(4), 0
    for _ in range(100):
        low, high = mean_of(examples(draw.exponential(1.0, 80)), "score")["interval_95"]
        covered += low <= 1.0 <= high
    assert 86 <= covered <= 100


def test_other_pictures_cannot_be_compared() -> None:
    with pytest.raises(ValueError, match="on other pictures"):
        difference(examples([1.0]), examples([1.0], names=["other"]), "score")


def test_a_base_of_zeros_has_no_percent() -> None:
    assert "percent" not in difference(examples([1.0, 0.0]), examples([0.0, 0.0]), "score")


def test_the_plan_has_each_cell_once_dense_ones_first() -> None:
    found = plan(cells.TASKS, cells.PARTS)
    assert len({(cell.task, cell.name) for cell in found}) == len(found) == 3 + 3 * 20 + 10 + 40
    assert found[:3] == [Cell(task) for task in cells.TASKS]
    assert not any(cell.is_sparse for cell in found[:3])
    assert {cell.task for cell in plan(["daquar"], cells.PARTS)} == {"daquar"}


def test_what_a_cell_is_compared_with() -> None:
    whole, learned = Cell("daquar"), Cell("daquar", "learned", 0.2)
    assert table.bases(whole) == {}
    assert table.bases(learned) == {"against_dense": whole}
    assert table.bases(Cell("daquar", "fastv", 0.2)) == {"against_dense": whole, "against_learned": learned}
    h2o = Cell("long-answers", "", 1.0, "h2o", 0.5)
    assert table.bases(h2o)["against_learned"] == Cell("long-answers", "", 1.0, "learned", 0.5)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Four pictures with captions, and the same with five questions each."""
    captions, pairs = [], []
    for number in range(4):
        for folder in ("flickr8k", "daquar"):
            (tmp_path / folder).mkdir(exist_ok=True)
            color = ("red", "green", "blue", "black")[number]
            Image.new("RGB", (32, 32), color).save(tmp_path / folder / f"{number}.png")
        entry = {"image": f"{number}.png", "split": "test"}
        captions.append({**entry, "captions": [f"A {color} wall.", f"It is {color}.", "A wall."]})
        pairs += [{**entry, "question": f"what is {asked} ?", "answer": color} for asked in range(5)]
    for path, lines in (("flickr8k/captions.jsonl", captions), ("daquar/qa.jsonl", pairs)):
        (tmp_path / path).write_text("\n".join(map(json.dumps, lines)))
    return tmp_path


def test_pictures_are_the_first_of_one_order_with_a_few_questions_each(photos: Path) -> None:
    names = {
        count: {question.picture for question in asked("daquar", photos, count)} for count in (1, 2, 3, 9)
    }
    assert [len(found) for found in names.values()] == [1, 2, 3, 4]
    assert names[1] < names[2] < names[3] < names[9]
    assert len(asked("daquar", photos, 2)) == 2 * cells.QUESTIONS


@pytest.fixture
def arguments(photos: Path, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The command line of a small table: two pictures, one rate of each kind."""
    for needed in ("pycocoevalcap", "wn", "nltk"):
        pytest.importorskip(needed, reason=f"{needed} is not installed")
    monkeypatch.setattr(cells, "IMAGE_RATES", (0.2,))
    monkeypatch.setattr(cells, "OUTPUT_RATES", (0.5,))
    monkeypatch.setattr(cells, "LONGEST", dict.fromkeys(cells.TASKS, 5))
    arguments = ["table", str(checkpoint), str(photos), "--output", str(tmp_path / "table.json")]
    arguments += ["--work", str(tmp_path / "work"), "--dtype", "float32"]
    return [*arguments, "--flickr8k", "2", "--daquar", "2", "--long-answers", "2"]


def test_a_table_is_measured_once(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", [*arguments, "--dry-run"])
    table.main()
    assert "28 cells" in capsys.readouterr().out
    assert not (tmp_path / "work").exists()
    monkeypatch.setattr("sys.argv", arguments)
    table.main()
    first = json.loads((tmp_path / "table.json").read_text())
    by_name = {
        (row["task"], Cell(*(row[name] for name in Cell.__annotations__)).name): row for row in first["rows"]
    }
    assert len(by_name) == 3 + 3 * 5 + 5 + 5
    for (task, name), row in by_name.items():
        assert row["prefill_ms"] > row["tower_ms"] > 0
        assert row["kv_bytes"] <= row["kv_bytes_allocated"]
        assert row["image_tokens_kept"] == pytest.approx(0.2 if row["image_rate"] < 1 else 1.0, abs=0.03)
        for score in table.SCORES[task]:
            assert ("against_dense" in row[score]) == (name != "image-all-output-all")
        assert ("token_times_faster" in row) == (task == "long-answers")
    assert by_name["long-answers", "image-all-output-uniform-0.5"]["output_tokens_kept"] < 0.8

    def fail(*_: object) -> None:
        raise AssertionError("measured again")

    monkeypatch.setattr(Measuring, "measure", fail)
    table.main()
    again = json.loads((tmp_path / "table.json").read_text())
    assert again["rows"] == first["rows"]


def test_a_cell_is_what_the_model_answers_and_leaves_it_as_it_was(
    photos: Path, model: LlavaForConditionalGeneration, processor: LlavaProcessor, tmp_path: Path
) -> None:
    pytest.importorskip("wn", reason="wn is not installed")
    questions = asked("daquar", photos, 3)
    config = model.sparsifier.config
    measuring = Measuring(model, processor, {"daquar": questions}, tmp_path / "work")
    found = measuring(Cell("daquar", "downsample", 0.2))
    assert model.sparsifier.config is config
    assert [example["image"] for example in found["examples"]] == [q.picture for q in questions]
    assert found["numbers"]["image_tokens_kept"] <= 0.2
    assert not model.model.vision_tower._forward_pre_hooks
    assert not model.model.vision_tower._forward_hooks


def test_a_model_without_predictors_is_refused(photos: Path, stock_checkpoint: Path, tmp_path: Path) -> None:
    model, processor = dynamic_llava.load(stock_checkpoint)
    measuring = Measuring(model, processor, {"daquar": asked("daquar", photos, 1)}, tmp_path)
    with pytest.raises(ValueError, match="no sparsifier, so nothing can be compared"):
        measuring(Cell("daquar"))
