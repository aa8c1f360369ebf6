"""The trainings of tiny models of other families run from end to end, and go on where they were."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dynamic_llava.files import first_line
from evidence import tiny_families


@pytest.mark.parametrize("name", tiny_families.FAMILIES)
def test_a_training_of_two_steps(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for setting, value in (
        ("PICTURES", 8), ("HELD_OUT", 6), ("BATCH", 4), ("STEPS", {name: {"dense": 2, "dynamic": 2}}),
    ):  # fmt: skip
        monkeypatch.setattr(tiny_families, setting, value)
    output = tmp_path / "numbers.json"
    arguments = ["tiny_families", "--work", str(tmp_path / "work"), "--only", name, "--output", str(output)]
    monkeypatch.setattr("sys.argv", arguments)
    try:
        assert tiny_families.main() == 1  # two steps teach nothing
    except ImportError as error:
        pytest.skip(first_line(str(error).strip()))
    found = json.loads(output.read_text())["families"][name]
    assert found["rows"].keys() == {"dense", "learned", "random", "uniform"}
    assert all(row["total"] == 6 for row in found["rows"].values())
    assert tiny_families.main() == 1  # trains nothing again
    assert json.loads(output.read_text())["families"][name] == found


def test_what_is_asked_stands_before_the_picture() -> None:
    (sample,) = tiny_families.samples("train", 1)
    place, _, question, answer = tiny_families.talk_about(sample.turns)[:4]
    assert place.startswith("Look at the ")
    assert "<image>" in question
    assert answer == sample.turns[0].answer
    assert sample.turns[0].answer not in place + question
