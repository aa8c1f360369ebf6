"""What a run was begun with, kept in its output folder, so that going on with something else is noticed."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from dynamic_llava.config import SparsityConfig
from dynamic_llava.data.conversations import Conversations
from dynamic_llava.files import first_line, replacing, write_json
from dynamic_llava.training import recipe as recipes
from dynamic_llava.training.recipe import Recipe
from dynamic_llava.training.watching import SHOWN

RECIPE = "recipe.yaml"
DATA = "data.json"
KEPT = (RECIPE, DATA)


class Record:
    """The copy of a recipe and the fingerprint of its data in the output folder.

    Parameters
    ----------
    path
        The recipe's file.
    recipe
        What it says.
    """

    def __init__(self, path: Path, recipe: Recipe) -> None:
        self.content = path.read_bytes()  # now, for it may be edited while the model loads
        self.recipe = recipe
        self.folder = recipe.run.output

    def differences(self) -> list[str]:
        """Say each thing that is not as it was when the run was begun."""
        return [*self._of_recipe(), *self._of_data()]

    def keep(self, step: int | None = None) -> None:
        """Write both; what another recipe said until ``step`` is kept beside them."""
        kept = self.folder / RECIPE
        if step is not None and kept.is_file():
            kept.rename(kept.with_stem(f"{kept.stem}-until-{step}"))
        with replacing(kept) as partial:
            partial.write_bytes(self.content)
        write_json(self.folder / DATA, fingerprint(self.recipe))

    def _of_recipe(self) -> Iterator[str]:
        kept = self.folder / RECIPE
        if not kept.is_file():
            yield f"begun by a version that kept no {RECIPE}, so what has changed since is unknown"
            return
        try:
            before = _settings(Recipe.read(kept))
        except ValueError as error:
            yield f"{RECIPE} of the run cannot be compared: {first_line(error)}"
            return
        yield from _changes(before, _settings(self.recipe))

    def _of_data(self) -> Iterator[str]:
        kept = self.folder / DATA
        if not (self.folder / RECIPE).is_file():
            return  # which is said already
        try:
            before = json.loads(kept.read_text(encoding="utf-8"))
            numbers = {name: then["entries"] for name, then in before.items()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            yield f"data of the run cannot be compared: {kept}: {first_line(error)}"
            return
        for name, now in fingerprint(self.recipe).items():
            if name in before and numbers[name] != now["entries"]:
                yield f"{name} was {numbers[name]} entries, is {now['entries']}"
            elif name in before and before[name] != now:
                yield f"{name} holds other entries"


def fingerprint(recipe: Recipe) -> dict[str, dict[str, Any]]:
    """Return the number and a digest of the entries that a recipe reads; drawn pictures have none."""
    return {
        name: Conversations(data.path, data.images, data.on_error).fingerprint(data.limit)
        for name, data in _conversations(recipe).items()
    }


def _conversations(recipe: Recipe) -> dict[str, recipes.Conversations]:
    """Return the files of conversations that a recipe reads, by the setting that names them."""
    evaluation = recipe.evaluation.conversations if recipe.evaluation else None
    read = {"data.conversations": recipe.data.conversations, "evaluation.conversations": evaluation}
    return {name: data for name, data in read.items() if data is not None}


def history(recipe: Recipe, steps: int, log: Sequence[Mapping[str, float]]) -> dict[str, Any]:
    """Return what the model card of trained predictors tells; of paths on this machine, only the last name.

    Parameters
    ----------
    recipe
        What it says.
    steps
        Optimizer steps taken.
    log
        What was logged, in order; the last number of each kind counts.
    """
    last: dict[str, float] = {}
    for row in log:
        last |= row
    settings = _named(recipe.model_dump(mode="json", exclude_unset=True))
    files = {name: {"name": data.path.name} for name, data in _conversations(recipe).items()}
    made = {
        "recipe": yaml.safe_dump(settings, sort_keys=False, allow_unicode=True),
        "data": {name: files[name] | entries for name, entries in fingerprint(recipe).items()},
        "steps": steps,
        "metrics": {name: last[name] for name in SHOWN if math.isfinite(last.get(name, math.nan))},
        "license": recipe.run.license,
    }
    return {name: value for name, value in made.items() if value}


def _named(value: Any) -> Any:
    """Return settings with the last names of absolute paths alone: elsewhere these mean nothing."""
    if isinstance(value, dict):
        return {name: _named(part) for name, part in value.items()}
    return Path(value).name if isinstance(value, str) and Path(value).is_absolute() else value


def _settings(recipe: Recipe) -> dict[str, Any]:
    """Return all that could make a difference; a folder may be moved."""
    settings = recipe.model_dump(mode="json", exclude={"run": {"output"}})
    if recipe.method is not None:
        settings["method"]["sparsity"] = SparsityConfig.from_dict(recipe.method.sparsity).to_dict()
    return settings


def _changes(before: dict[str, Any], now: dict[str, Any], section: str = "") -> Iterator[str]:
    for name in dict.fromkeys((*before, *now)):
        then, value = before.get(name), now.get(name)
        if isinstance(then, dict) and isinstance(value, dict):
            yield from _changes(then, value, f"{section}{name}.")
        elif then != value:
            yield f"{section}{name} was {_shown(then)}, is {_shown(value)}"


def _shown(value: Any) -> str:
    return "not set" if value is None else value if isinstance(value, str) else json.dumps(value)
