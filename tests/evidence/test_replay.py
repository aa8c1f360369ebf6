"""Committed results name the command that writes them, and the replay finds it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from evidence import replay

FILES = replay.chosen([])


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_every_result_names_the_command_that_writes_it(file: Path) -> None:
    assert replay.command(file)


def test_patterns_choose_files() -> None:
    assert [file.stem for file in replay.chosen(["equiv*"])] == ["equivalence"]
    with pytest.raises(ValueError, match=r"has no nothing\.json: name one of .*equivalence"):
        replay.chosen(["nothing"])


@pytest.mark.parametrize(
    ("named", "said"),
    [
        ("rm -rf /", r"starts with none of dynamic-llava, python -m, make"),
        ("dynamic-llava bench --output other.json", r"it needs --output evidence/results/made\.json"),
    ],
)
def test_a_command_that_does_not_write_its_file_is_refused(named: str, said: str, tmp_path: Path) -> None:
    file = tmp_path / "made.json"
    file.write_text(json.dumps({"command": named}))
    with pytest.raises(ValueError, match=said):
        replay.command(file)


def test_commands_run_with_this_interpreter() -> None:
    assert replay.run("dynamic-llava flops --help") == 0
    assert replay.run("python -m evidence.replay --list equivalence") == 0
