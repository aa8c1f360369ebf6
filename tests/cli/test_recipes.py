"""``dynamic-llava recipes``: listed, shown and copied; ``train`` takes them by name."""

from __future__ import annotations

import tomllib
from importlib import resources
from pathlib import Path

import pytest
from tests.command_line import Command, refused

from dynamic_llava.training import bundled

RECIPES = Path(__file__).parents[2] / "recipes"
NAMES = sorted(path.relative_to(RECIPES).with_suffix("").as_posix() for path in RECIPES.rglob("*.yaml"))


def test_list(command: Command) -> None:
    listed = command("recipes", "--json").json()["recipes"]
    assert sorted(listed) == NAMES
    assert all(len(sentence) > 20 and "\n" not in sentence for sentence in listed.values())
    shown = command("recipes").stdout
    assert all(name in shown for name in NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_show(name: str, command: Command) -> None:
    text = (RECIPES / f"{name}.yaml").read_text()
    assert command("recipes", name).stdout == text
    assert command("recipes", f"recipes/{name}.yaml", "--json").json() == {
        "name": f"recipes/{name}.yaml",
        "text": text,
    }


def test_copy(command: Command, tmp_path: Path) -> None:
    written = command("recipes", "--copy", tmp_path / "all", "--json").json()["written"]
    assert sorted(written) == sorted(str(tmp_path / "all" / f"{name}.yaml") for name in NAMES)
    outcome = command("recipes", "nano-vision", "--copy", tmp_path / "one")
    assert (outcome.code, outcome.stdout) == (0, "")
    copied = tmp_path / "one" / "nano-vision.yaml"
    assert list((tmp_path / "one").iterdir()) == [copied]
    assert copied.read_text() == (RECIPES / "nano-vision.yaml").read_text()


def test_copy_replaces_nothing(command: Command, tmp_path: Path) -> None:
    mine = tmp_path / "nano-vision.yaml"
    mine.write_text("mine")
    for ask in (("recipes", "nano-vision"), ("recipes",)):
        assert f"{mine} exists already" in refused(command, *ask, "--copy", tmp_path)
    assert [path.read_text() for path in tmp_path.iterdir()] == ["mine"]
    assert "no folder that can be written to" in refused(command, "recipes", "--copy", mine)


@pytest.mark.parametrize("name", ["no-such-recipe", "../pyproject", "nano-vision.yml", ""])
def test_unknown(name: str, command: Command) -> None:
    assert "no such recipe: choose from accelerate/fsdp2" in refused(command, "recipes", name)
    assert "neither a file nor a bundled one" in refused(command, "train", name)


@pytest.mark.parametrize("name", ["nano-vision", "nano-vision.yaml", "recipes/nano-vision.yaml"])
def test_train_takes_a_bundled_name(
    name: str, command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert command("train", name, "--dry-run", "--json").json()["steps"] == 700


def test_own_file_comes_before_a_bundled_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert bundled.find("nano-vision") == bundled.folder() / "nano-vision.yaml"
    Path("nano-vision").write_text("mine")
    assert bundled.find("nano-vision") == Path("nano-vision")


def test_wheel_holds_them_where_they_are_looked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "one.yaml").write_text("# command\n# Says this. And that.\n")
    monkeypatch.setattr(resources, "files", lambda _: tmp_path)
    assert bundled.names() == ["one"]
    assert bundled.says(bundled.bundled("one").read_text()) == "Says this"
    project = tomllib.loads((RECIPES.parent / "pyproject.toml").read_text())
    wheel = project["tool"]["hatch"]["build"]["targets"]["wheel"]
    assert wheel["force-include"] == {"recipes": "dynamic_llava/recipes"}
