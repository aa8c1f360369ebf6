"""Recipes: the shipped ones read, wrong ones are refused by name."""

from __future__ import annotations

from pathlib import Path

import pytest

from dynamic_llava.training.recipe import Recipe

RECIPES = Path(__file__).parents[2] / "recipes"
GOOD = (
    "stage: vision\noutput: out\nsteps: 2\nscenes_per_step: 1\neasy_vqa_per_step: 0\nlearning_rate: 0.001\n"
)


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
        (GOOD.replace("steps: 2", "steps: 0"), "steps"),
        (GOOD.replace("vision", "sparse"), "stage"),
        (GOOD.replace("vision", "dense"), "init"),
        (GOOD.replace("vision", "dynamic"), "sparsity"),
        (GOOD.replace("scenes_per_step: 1", "scenes_per_step: 0"), "nothing to train on"),
    ],
)
def test_wrong_recipes_are_refused_with_file_and_field(tmp_path: Path, text: str, says: str) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=says) as error:
        Recipe.read(path)
    assert str(path) in str(error.value)


def test_missing_recipe_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"none\.yaml"):
        Recipe.read(tmp_path / "none.yaml")
