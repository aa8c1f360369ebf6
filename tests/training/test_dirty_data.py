"""A training that skips ends well on the dirtiest data; one that does not ends with the entry in one line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from tests.command_line import Command
from tests.training.conftest import WriteRecipe

from dynamic_llava.training import run

QUESTION = "<image>\nwhat color is it?"


def entry(name: str, image: Any = "good.png", question: Any = QUESTION, answer: Any = "red") -> Any:
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    return {"id": name, "image": image, "conversations": turns}


GOOD = [entry(f"good-{number}") for number in range(4)]
TWO = entry("two", ["good.png"] * 2)
TWO["conversations"] *= 2
BAD = [
    entry("null", [None]),
    entry("surrogate", question="<image> caf\ud83d"),
    entry("folder", "."),
    entry("gone", "gone.png"),
    entry("notes", "mix.jsonl"),
    entry("number", question=7),
    entry("list", answer=["red"]),
    entry("nothing", answer=None),
    entry("nan", float("nan")),
    entry("long", question=QUESTION + " red" * 3000),
    {"id": "empty"},
    {"id": ["a", {"b": 1}], "conversations": "red"},
    {},
    [],
    None,
    7,
]
BROKEN_LINES = ['{"id": "half', "[" * 10_000, '{"id": ' + "9" * 5000 + "}"]


@pytest.fixture
def write_dirty(tmp_path: Path, write_recipe: WriteRecipe) -> WriteRecipe:
    """Write a recipe over four good entries, one that is cut, and all kinds of bad ones between them."""
    Image.new("RGB", (60, 60), "red").save(tmp_path / "good.png")
    lines = (
        [json.dumps(item) for item in (*GOOD[:2], *BAD, TWO)] + BROKEN_LINES + list(map(json.dumps, GOOD[2:]))
    )
    (tmp_path / "mix.jsonl").write_text("\n".join(lines))

    def write(name: str, **data: Any) -> Path:
        none = {"scenes_per_step": None, "easy_vqa_per_step": None, "steps": None}
        settings = {"data": {"path": str(tmp_path / "mix.jsonl"), "max_length": 80, **data}, "batch_size": 4}
        return write_recipe(name, **none, **settings, workers=2)

    return write


def test_a_training_that_skips(write_dirty: WriteRecipe, capfd: pytest.CaptureFixture[str]) -> None:
    folder = run.train(write_dirty("run", on_error="skip")).parent
    last = json.loads((folder / run.LOG).read_text().splitlines()[-1])
    told = capfd.readouterr().err
    assert last["truncated_entries"] >= 1
    assert f"skipped entries: {last['skipped_entries']:.0f}\n" in told
    assert last["skipped_entries"] >= len(BAD) + len(BROKEN_LINES)
    assert told.count("skipped: ") == 5
    assert "cut: two: cut to " in told
    assert "before picture 2 of 2" in told


def test_a_training_that_raises(write_dirty: WriteRecipe, command: Command, tmp_path: Path) -> None:
    lines = (tmp_path / "mix.jsonl").read_text().splitlines()
    (tmp_path / "mix.jsonl").write_text("\n".join(line for line in lines if line not in BROKEN_LINES))
    outcome = command("train", write_dirty("run"))
    assert outcome.code == 2
    last = outcome.stderr.splitlines()[-1]
    assert last.startswith("error: ")
    assert len(last) < 300
    assert "Traceback" not in outcome.stderr


def test_data_without_a_good_entry(write_dirty: WriteRecipe, command: Command, tmp_path: Path) -> None:
    (tmp_path / "mix.jsonl").write_text("\n".join(map(json.dumps, BAD)))
    outcome = command("train", write_dirty("run", on_error="skip"))
    assert outcome.code == 2
    assert "mix.jsonl: not one good entry; the first: " in outcome.stderr.splitlines()[-1]
