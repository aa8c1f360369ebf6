"""Recipes: the shipped ones read, wrong ones are refused by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from dynamic_llava.training.recipe import MOVED, Recipe

RECIPES = Path(__file__).parents[2] / "recipes"
DRAWN = "drawn: {scenes_per_step: 1, easy_vqa_per_step: 0}"
GOOD = (
    f"stage: {{name: vision}}\ndata: {{{DRAWN}}}\n"
    "optimizer: {learning_rate: 0.001}\nrun: {output: out, steps: 2}\n"
)
DENSE = GOOD.replace("name: vision", "name: dense, init: somewhere")
DYNAMIC = GOOD.replace("name: vision", "name: dynamic, init: somewhere")
METHOD = "method: {sparsity: {}}\n"
TALK = DYNAMIC.replace(DRAWN, "conversations: {path: a.json}")


SHIPPED = [*RECIPES.glob("*.yaml"), *RECIPES.glob("results/*.yaml")]


@pytest.mark.parametrize("path", sorted(SHIPPED), ids=lambda path: path.stem)
def test_shipped_recipes_read_and_start_with_their_command(path: Path) -> None:
    Recipe.read(path)
    assert f"train recipes/{path.relative_to(RECIPES)}" in path.read_text().splitlines()[0]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("stage: [", "not a YAML file"),
        ("just words", "mapping"),
        (GOOD + "learningrate: 3\n", "learningrate"),
        (GOOD.replace("steps: 2", "steps: 0"), r"run\.steps"),
        (GOOD.replace("vision", "sparse"), r"stage\.name"),
        (GOOD.replace("vision", "dense"), "init"),
        (DYNAMIC, "sparsity"),
        (GOOD.replace("scenes_per_step: 1", "scenes_per_step: 0"), "nothing to train on"),
        (GOOD.replace("learning_rate", "learningrate"), r"optimizer\.learning"),
        (
            GOOD.replace("drawn: {scenes_per_step: 1, easy_vqa_per_step: 0}", ""),
            "data: .*nothing to train on",
        ),
        (GOOD.replace("data: {", "data: {conversations: {path: a.json}, "), "data: .*both"),
        (GOOD.replace("data: {", "data: {accumulate: 2, "), "data: .*accumulate"),
        (GOOD.replace(", steps: 2", ""), r"run\.steps: drawn pictures never end"),
        (TALK.replace("name: dynamic", "name: vision"), "data: the vision stage"),
        (DENSE + METHOD, "method: the dense stage"),
        (DYNAMIC + "method: {sparsity: {layer: 0}}", "method: sparsity: .*layer"),
        (DYNAMIC + "method: {sparsity: {sparsify_prompt: true}}", "method: sparsity: sparsify_prompt"),
        (DYNAMIC + METHOD.replace("{}", "{}, image_rates: [0.1, 0.2]"), "method: image_rates and text_rates"),
        (
            DYNAMIC + METHOD.replace("{}", "{}, image_rates: [0.3, 0.2], text_rates: [0.1, 0.2]"),
            "bounds must rise",
        ),
        (DENSE + "evaluation: {every: 30}", r"evaluation\.every must be a multiple of run\.save_every"),
        (DENSE + "evaluation: {every: 100, conversations: {path: a}}", r"evaluation\.conversations"),
        (TALK + METHOD + "evaluation: {every: 100}", r"evaluation\.conversations"),
        (GOOD + "1: x\n", "1: Keys should be strings"),
        (GOOD + "? [a]\n: x\n", "not a YAML file: while constructing a mapping"),
        (GOOD.replace("0.001", ".inf"), r"optimizer\.learning_rate: Input should be a finite number"),
        (GOOD.replace("0.001", ".nan"), r"optimizer\.learning_rate: Input should be"),
        (GOOD.replace("0.001", "2001-99-99"), "not a YAML file: month must be in 1..12"),
        (GOOD.replace("0.001", "!!bool x"), "not a YAML file: 'x'"),
        (GOOD.replace("0.001", "!!python/name:os.system ''"), "not a YAML file: could not determine"),
        (GOOD.replace("0.001", "[" * 5000), "not a YAML file: "),
        (GOOD.replace("steps: 2", "steps: 2, seed: -1"), r"run\.seed"),
        (GOOD.replace("steps: 2", f"steps: 2, seed: {10**30}"), r"run\.seed"),
        (GOOD.replace("output: out", r'output: "a\0b"'), r"run\.output: holds a null character"),
        (GOOD.replace("data: {", "data: &a {conversations: *a, "), r"data\.conversations"),
        (DYNAMIC + "method: {sparsity: {1: 2}}", r"method\.sparsity"),
        (DYNAMIC + "method: {sparsity: {text_margins: [a, b]}}", "method: sparsity: text_margins is"),
    ],
)
def test_wrong_recipes_are_refused_with_file_and_field(tmp_path: Path, text: str, says: str) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=says) as error:
        Recipe.read(path)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("text", [GOOD, DENSE, DYNAMIC + METHOD, TALK + METHOD])
def test_recipes_that_the_wrong_ones_differ_from_are_right(tmp_path: Path, text: str) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    Recipe.read(path)


def flat(path: Path) -> dict[str, Any]:
    """A shipped recipe as it was written before there were sections."""
    recipe = yaml.safe_load(path.read_text())
    settings = {}
    for name, place in MOVED.items():
        value = recipe
        for key in place.split("."):
            value = value.get(key) if isinstance(value, dict) else None
        if value is not None:
            settings[name] = value
    return settings


@pytest.mark.parametrize("path", sorted(SHIPPED), ids=lambda path: path.stem)
def test_flat_recipes_are_told_where_each_setting_went(path: Path, tmp_path: Path) -> None:
    old = tmp_path / "old.yaml"
    settings = flat(path)
    old.write_text(yaml.safe_dump(settings))
    with pytest.raises(ValueError, match="settings lie in sections now: move stage") as error:
        Recipe.read(old)
    message = str(error.value)
    assert str(old) in message
    assert "\n" not in message
    said = message.partition(" now: move ")[2]
    moves = dict(reversed(part.rsplit(" into ", 1)) for part in said.split("; "))
    for name in settings:
        section, _, key = MOVED[name].rpartition(".")
        assert (name if name == key else f"{name} (as {key})") in moves[section].split(", ")


def test_a_setting_outside_of_its_section_is_told_where_it_belongs(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(DENSE + "seed: 3\nevaluation: {every: 100, data: {path: a.json}}\n")
    with pytest.raises(ValueError, match=r"move seed into run; evaluation\.data \(as conversations\)"):
        Recipe.read(path)


def test_missing_recipe_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"none\.yaml"):
        Recipe.read(tmp_path / "none.yaml")
