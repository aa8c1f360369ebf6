"""A run goes on with what it was begun with: changes are named, and refused unless they are allowed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from tests.training.conftest import WriteRecipe

from dynamic_llava.training import run
from dynamic_llava.training.stages.dense import DenseObjective


def conversation(number: int, answer: str = "red") -> dict[str, Any]:
    turns = [{"from": "human", "value": f"what color is {number}?"}, {"from": "gpt", "value": answer}]
    return {"id": str(number), "conversations": turns}


@pytest.fixture
def talk(tmp_path: Path) -> Path:
    path = tmp_path / "talk.json"
    path.write_text(json.dumps([conversation(number) for number in range(4)]))
    return path


@pytest.fixture
def write_talk(write_recipe: WriteRecipe, talk: Path) -> WriteRecipe:
    def write(name: str, **changes: Any) -> Path:
        none = {"scenes_per_step": None, "easy_vqa_per_step": None}
        return write_recipe(name, **{**none, "data": {"path": str(talk)}, **changes})

    return write


def refused(recipe: Path, *parts: str) -> None:
    """Resuming is refused with one line that holds ``parts``, and nothing is changed."""
    folder = recipe.with_suffix("")
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    with pytest.raises(ValueError, match="--allow-changes") as caught:
        run.train(recipe, resume=True)
    message = str(caught.value)
    assert "\n" not in message
    assert str(folder) in message
    assert [part for part in parts if part not in message] == []
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before


def test_the_output_folder_keeps_the_recipe_as_it_was_written(write_recipe: WriteRecipe) -> None:
    recipe = write_recipe("run")
    recipe.write_text("# why this run\n" + recipe.read_text())
    run.train(recipe)
    assert (recipe.with_suffix("") / "recipe.yaml").read_bytes() == recipe.read_bytes()


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"learning_rate": 0.01}, ["optimizer.learning_rate was 0.001, is 0.01"]),
        ({"seed": 3}, ["run.seed was 0, is 3"]),
        ({"steps": 6}, ["run.steps was 4, is 6"]),
        ({"sparsity": {"image_keep_rate": 0.5}}, ["method.sparsity.image_keep_rate was 0.2, is 0.5"]),
        ({"scenes_per_step": 1}, ["data.drawn.scenes_per_step was 2, is 1"]),
        ({"tau_end": 0.2, "optimizer": "muon"}, ["method.tau_end was 0.1", "optimizer.name was adamw"]),
        ({"image_rates": [0.1, 0.2], "text_rates": [0.1, 0.2]}, ["image_rates was not set, is [0.1, 0.2]"]),
        ({"evaluation": {"every": 2}}, ["evaluation was not set, is"]),
    ],
)
def test_every_change_of_the_recipe_is_named(
    write_recipe: WriteRecipe, changes: dict[str, Any], parts: list[str]
) -> None:
    run.train(write_recipe("run"))
    refused(write_recipe("run", **changes), "another recipe", *parts)


def test_what_says_the_same_is_no_change(write_recipe: WriteRecipe) -> None:
    recipe = write_recipe("run")
    run.train(recipe)
    values = yaml.safe_load(recipe.read_text())
    values["run"]["seed"] = 0
    values["method"]["tau_end"] = 1.0e-1
    recipe.write_text("# said otherwise\n" + yaml.safe_dump(values, sort_keys=False))
    run.train(recipe, resume=True)


def test_a_moved_folder_is_no_change(write_recipe: WriteRecipe) -> None:
    run.train(write_recipe("run"))
    moved = write_recipe("moved")
    moved.with_name("run").rename(moved.with_suffix(""))
    run.train(moved, resume=True)


def test_allowed_changes_are_told_and_kept(
    write_recipe: WriteRecipe, capsys: pytest.CaptureFixture[str]
) -> None:
    first = write_recipe("run")
    begun = first.read_bytes()
    run.train(first)
    changed = write_recipe("run", learning_rate=0.01, steps=6)
    capsys.readouterr()
    run.train(changed, resume=True, allow_changes=True)
    told = capsys.readouterr().err
    assert "changed: optimizer.learning_rate was 0.001, is 0.01\n" in told
    assert "changed: run.steps was 4, is 6\n" in told
    folder = first.with_suffix("")
    assert (folder / "recipe.yaml").read_bytes() == changed.read_bytes()
    assert (folder / "recipe-until-4.yaml").read_bytes() == begun
    assert (folder / "checkpoint-6").is_dir()
    run.train(changed, resume=True)
    with pytest.raises(ValueError, match="--allow-changes is for --resume"):
        run.train(write_recipe("other"), allow_changes=True)


def test_a_resumed_run_logs_and_saves_as_often_as_its_recipe_says_now(write_recipe: WriteRecipe) -> None:
    folder = run.train(write_recipe("run")).parent
    changed = write_recipe("run", steps=10, save_every=3, log_every=5)
    run.train(changed, resume=True, allow_changes=True)
    written = {path.name for path in folder.glob("checkpoint-*")}
    assert {"checkpoint-9", "checkpoint-10"} <= written
    assert "checkpoint-8" not in written
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line][-2:] == [5, 10]


@pytest.mark.parametrize("change", ["added", "removed", "edited", "swapped"])
def test_other_entries_are_a_change(write_talk: WriteRecipe, talk: Path, change: str) -> None:
    recipe = write_talk("run")
    run.train(recipe)
    entries = json.loads(talk.read_text())
    if change == "added":
        entries.append(conversation(9))
    elif change == "removed":
        entries.pop()
    elif change == "edited":
        entries[2] = conversation(2, "blue")
    else:
        entries = entries[::-1]
    talk.write_text(json.dumps(entries))
    said = "4 entries, is" if change in ("added", "removed") else "other entries"
    refused(recipe, "data.conversations", said)
    run.train(recipe, resume=True, allow_changes=True)
    run.train(recipe, resume=True)


def test_entries_that_are_not_used_are_no_change(write_talk: WriteRecipe, talk: Path) -> None:
    recipe = write_talk("run", data={"path": str(talk), "limit": 3})
    run.train(recipe)
    entries = [*json.loads(talk.read_text()), conversation(9)]
    talk.write_text(json.dumps(entries))
    run.train(recipe, resume=True)


def test_entries_to_evaluate_on_count_too(write_talk: WriteRecipe, talk: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.json"
    other.write_text(json.dumps([conversation(7), conversation(8)]))
    recipe = write_talk("run", evaluation={"every": 2, "conversations": {"path": str(other)}})
    run.train(recipe)
    other.write_text(json.dumps([conversation(7)]))
    refused(recipe, "evaluation.conversations", "2 entries, is 1")


def test_a_run_that_ended_before_its_first_step_starts_again(
    write_recipe: WriteRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(DenseObjective, "logits", fail)
        with pytest.raises(MemoryError):
            run.train(write_recipe("run"))
    changed = write_recipe("run", seed=3)
    run.train(changed)
    assert (changed.with_suffix("") / "recipe.yaml").read_bytes() == changed.read_bytes()


def test_a_run_of_before_kept_no_recipe(write_recipe: WriteRecipe) -> None:
    recipe = write_recipe("run")
    run.train(recipe)
    (recipe.with_suffix("") / "recipe.yaml").unlink()
    refused(recipe, "kept no recipe.yaml")
    run.train(recipe, resume=True, allow_changes=True)
    run.train(recipe, resume=True)


def test_a_kept_recipe_that_cannot_be_read(write_recipe: WriteRecipe) -> None:
    recipe = write_recipe("run")
    run.train(recipe)
    (recipe.with_suffix("") / "recipe.yaml").write_text("stage: dense\ninit: somewhere\n")
    refused(recipe, "recipe.yaml", "settings lie in sections now")
    (recipe.with_suffix("") / "data.json").write_text("{")
    refused(recipe, "data.json")
    (recipe.with_suffix("") / "data.json").unlink()
    refused(recipe, "data.json")


def test_parameters_must_be_the_same_even_so(write_recipe: WriteRecipe) -> None:
    run.train(write_recipe("run"))
    with pytest.raises(ValueError, match="a checkpoint of another recipe"):
        run.train(write_recipe("run", train="predictors"), resume=True, allow_changes=True)


@pytest.mark.parametrize(("step", "advice"), [(0, "start again"), (3, "--resume --allow-changes")])
def test_advice_after_a_gradient_that_is_not_finite(
    write_recipe: WriteRecipe, monkeypatch: pytest.MonkeyPatch, step: int, advice: str
) -> None:
    forward = DenseObjective.logits

    def explode(self, group, **masks):  # type: ignore[no-untyped-def]
        return forward(self, group, **masks) * (float("nan") if self.noise.step == step else 1.0)

    monkeypatch.setattr(DenseObjective, "logits", explode)
    with pytest.raises(FloatingPointError, match=advice):
        run.train(write_recipe("run"))
