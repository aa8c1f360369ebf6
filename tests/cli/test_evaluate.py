"""``dynamic-llava evaluate``: its JSON, its result file, its table."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.command_line import Command, refused
from tests.test_files import BAD_FILES

from dynamic_llava import evaluation

PROVENANCE = {
    "command",
    "versions",
    "machine",
    "seed",
    "date",
    "task",
    "model",
    "dense",
    "questions",
    "numbers",
    "dtype",
}


@pytest.mark.parametrize("task", ["easy-vqa", "scenes", "descriptions"])
@pytest.mark.parametrize("dense", [(), ("--dense",)])
def test_command(
    task: str, dense: tuple[str, ...], command: Command, checkpoint: Path, tmp_path: Path
) -> None:
    path = tmp_path / "results" / "new.json"
    ask = ("evaluate", "--task", task, "--limit", 4, "--seed", 3, "--model", checkpoint, *dense)
    outcome = command(*ask, "--output", path, "--json")
    assert outcome.code == 0
    assert outcome.stdout.count("\n") == 1
    result = outcome.json()
    assert json.loads(path.read_text()) == result
    assert list(path.parent.iterdir()) == [path]
    assert result.keys() >= PROVENANCE
    assert result["command"].startswith("dynamic-llava evaluate --task ")
    assert (result["task"], result["questions"], result["seed"]) == (task, 4, 3)
    assert result["dense"] is bool(dense)
    assert (result["sparsity"] is None) is bool(dense)
    assert {"python", "torch", "transformers", "dynamic-llava"} <= result["versions"].keys()
    numbers = result["numbers"]["dense"] if task == "descriptions" else result["numbers"]
    low, high = numbers["interval_95"]
    assert 0 <= low <= numbers["accuracy"] <= high <= 100
    assert numbers["total"] == 4


def test_table_in_a_terminal(command: Command, checkpoint: Path) -> None:
    outcome = command("evaluate", "--task", "scenes", "--limit", 4, "--model", checkpoint)
    assert outcome.code == 0
    assert "accuracy" in outcome.stdout
    assert "all" in outcome.stdout


def test_nothing_is_written_unasked(
    command: Command, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "evidence" / "results"
    folder.mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(evaluation, "evaluate", lambda *_, **__: {"numbers": {}})
    outcome = command("evaluate", "--task", "scenes", "--model", checkpoint, "--json")
    assert (outcome.code, outcome.stderr) == (0, "")
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize(("make", "message"), BAD_FILES)
def test_bad_output_is_refused_before_a_model_is_loaded(
    make: Callable[[Path], Path], message: str, command: Command, tmp_path: Path
) -> None:
    ask = ("evaluate", "--task", "scenes", "--model", "no-such-model")
    assert message in refused(command, *ask, "--output", make(tmp_path))


def test_a_contact_sheet_is_written_beside(command: Command, checkpoint: Path, tmp_path: Path) -> None:
    path = tmp_path / "new" / "sheet.html"
    ask = ("evaluate", "--task", "scenes", "--limit", 30, "--model", checkpoint, "--json")
    outcome = command(*ask, "--sheet", path)
    assert (outcome.code, outcome.stderr) == (0, f"written: {path}\n")
    assert path.read_text(encoding="utf-8").count("<article>") > 1


def test_a_contact_sheet_of_a_dense_model_is_refused(
    command: Command, stock_checkpoint: Path, tmp_path: Path
) -> None:
    ask = ("evaluate", "--task", "scenes", "--model", stock_checkpoint, "--sheet", tmp_path / "sheet.html")
    outcome = command(*ask)
    assert outcome.code == 2
    assert outcome.stderr.splitlines()[-1].startswith("error: a contact sheet shows dense and sparse answers")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("make", "message"), BAD_FILES)
def test_a_bad_sheet_is_refused_before_a_model_is_loaded(
    make: Callable[[Path], Path], message: str, command: Command, tmp_path: Path
) -> None:
    said = refused(command, "evaluate", "--task", "scenes", "--model", "none", "--sheet", make(tmp_path))
    assert message.replace("--output", "--sheet") in said
