"""The part of docs/results.md about photo says what its files say, and nothing that was not measured."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from evidence.photo import cells, pages, table
from evidence.photo.bare import bare

ROOT = Path(__file__).parents[2]
GAINS = {"learned": 0.0, "fastv": -1.0, "h2o": -1.0}  # of a score, against the learned choice


def row(cell: cells.Cell) -> dict[str, Any]:
    """A row whose scores fall with what is dropped; all but FastV and H2O lose two to the learned choice."""
    budget = 10 * (cell.image_rate + cell.output_rate)
    loss = GAINS.get(cell.image or cell.output, -2.0) if table.bases(cell) else 0.0
    scores = {}
    for score in table.SCORES[cell.task]:
        mean = budget + loss if score not in pages.LOWER else 50 - budget - loss
        scores[score] = {"mean": mean, "interval_95": [mean - 1, mean + 1]}
        for title in table.bases(cell):
            low = -1.0 if loss == -1.0 else -3.0
            scores[score][title] = {
                "difference": loss, "interval_95": [low, low + 2],
                "percent": 100 * loss, "percent_interval_95": [100 * low, 100 * low + 200],
            }  # fmt: skip
    numbers = {"image_tokens_kept": cell.image_rate, "output_tokens_kept": cell.output_rate, "bleu_4": budget}
    costs = {"prefill_ms": 100 * cell.image_rate, "token_ms": 5.0, "kv_bytes": 8e6, "kv_bytes_allocated": 9e6}
    faster = ("prefill_times_faster", "decoder_prefill_times_faster", "token_times_faster")
    return {**asdict(cell), **numbers, **costs, **dict.fromkeys(faster, 1.5), **scores}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with docs/results.md, where nothing is measured."""
    (tmp_path / "docs").mkdir()
    shutil.copy(ROOT / "docs" / "results.md", tmp_path / "docs")
    monkeypatch.chdir(tmp_path)
    return tmp_path / "evidence" / "results"


def written() -> str:
    pages.write()
    return Path("docs/results.md").read_text(encoding="utf-8")


def part(text: str) -> str:
    return text[text.index("<!-- photo -->") : text.index("<!-- /photo -->")]


def put(folder: Path, name: str, content: Any) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps(content))


def measured() -> dict[str, Any]:
    found = [row(cell) for cell in cells.plan(cells.TASKS, cells.PARTS)]
    return {"rows": found, "batch_size": 10, "pictures": {"flickr8k": 200, "daquar": 100}}


def test_what_was_not_measured_is_said_to_be_missing(folder: Path) -> None:
    text = part(written())
    assert text.count(pages.MISSING) == len(re.findall(r"(?m)^\{", pages.TEMPLATE.read_text()))
    assert "{" not in text
    assert not Path("docs/images").exists()


def test_everything_that_was_measured_is_there_and_the_rest_stays(folder: Path) -> None:
    before = Path("docs/results.md").read_text(encoding="utf-8")
    put(folder, "photo", measured())
    interval = {"ratio": 1.5, "interval_95": [1.2, 1.8]}
    put(folder, "photo-kept", {"results": {"learned 0.2": interval, "uniform 0.2": interval}})
    numbers = {"bleu_1": 60.0, "bleu_4": 20.0, "meteor": 40.0, "rouge_l": 45.0, "cider": 55.5}
    for kind, kept in (("dense", 1.0), ("sparse", 0.2)):
        put(
            folder,
            f"photo-flickr8k-{kind}",
            {"questions": 1000, "numbers": {**numbers, "image_tokens_kept": kept}},
        )
    after = written()
    text = part(after)
    assert pages.MISSING not in text
    assert "200 pictures of flickr8k, 100 pictures of daquar" in text
    assert "| flickr8k, 1,000 questions | CIDEr | 55.5 | 55.5 | 20% |" in text
    assert "| learned | 1.50 (1.20 to 1.80) |" in text
    # Rows of image tokens: the learned choice is the best, FastV may be level, the others are not.
    assert (
        "| 20% | **12.0 (11.0 to 13.0)** | 10.0 (9.0 to 11.0) | 10.0 (9.0 to 11.0) | ≈ 11.0 (10.0 to 12.0)"
        in text
    )
    assert Path("docs/images/results/photo.png").stat().st_size > 10_000
    assert before.replace(part(before), "") == after.replace(text, "")
    assert written() == after


def test_lower_is_better_where_it_is(folder: Path) -> None:
    result = measured()
    put(folder, "photo", result)
    lines = pages.measured(result)["output perplexity"]
    assert lines[0] == ["output tokens", *cells.OUTPUT_METHODS]
    assert [cell.startswith("**") for cell in lines[2][1:]] == [True, False, False, False, False]
    assert [cell.startswith("≈") for cell in lines[2][1:]] == [False, False, False, True, False]


def test_a_table_of_one_task_leaves_the_others_out(folder: Path) -> None:
    rows = [row(cell) for cell in cells.plan(["daquar"], ["image"])]
    put(folder, "photo", {"rows": rows, "batch_size": 10, "pictures": {"daquar": 5}})
    text = part(written())
    assert "| short answers, exactly right, % | 20%, 100% |" in text
    assert pages.MISSING in text


def test_the_template_names_nothing_that_is_not_filled() -> None:
    names = set(re.findall(r"\{([^}]+)\}", pages.TEMPLATE.read_text(encoding="utf-8")))
    assert names == {*pages.measured({}), *pages.words({}), "splits", "kept"}


def test_results_are_committed_without_other_peoples_texts(tmp_path: Path) -> None:
    path, folder = tmp_path / "photo-flickr8k-dense.json", tmp_path / "whole"
    examples = [{"image": "1.jpg", "answer": "A dog.", "references": ["Somebody's words."]}]
    whole = {"task": "flickr8k", "numbers": {"cider": 50.0, "examples": examples}}
    path.write_text(json.dumps(whole))
    for _ in range(2):  # the second time there is nothing to take out
        bare(folder, [path])
        assert json.loads(path.read_text()) == {"task": "flickr8k", "numbers": {"cider": 50.0}}
        assert json.loads((folder / path.name).read_text()) == whole
