"""The recipes that come with this package, found by name."""

from __future__ import annotations

import itertools
from importlib import resources
from pathlib import Path

SUFFIX = ".yaml"


def folder() -> Path:
    """Return where they lie: in the package, or beside its sources in a checkout."""
    inside = Path(str(resources.files("dynamic_llava"))) / "recipes"
    return inside if inside.is_dir() else inside.parents[2] / "recipes"


def names() -> list[str]:
    """Return their names, such as ``llava-1.5-7b-predictors``; settings of accelerate are among them."""
    paths = (path.relative_to(folder()) for path in folder().rglob(f"*{SUFFIX}"))
    return sorted(path.with_suffix("").as_posix() for path in paths)


def bundled(name: str) -> Path:
    """Return the file of a bundled recipe, by its name or by its path in a checkout.

    Raises
    ------
    FileNotFoundError
        If there is none of that name.
    """
    short = name.removeprefix("recipes/").removesuffix(SUFFIX)
    if short not in names():
        raise FileNotFoundError(f"{name}: no such recipe: choose from {', '.join(names())}")
    return folder() / f"{short}{SUFFIX}"


def find(name: str) -> Path:
    """Return the file that ``name`` means: one of the user's, else the bundled recipe of that name.

    Raises
    ------
    FileNotFoundError
        If there is neither.
    """
    try:
        return Path(name) if Path(name).is_file() else bundled(name)
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"{name}: no such recipe, neither a file nor a bundled one: dynamic-llava recipes lists these"
        ) from error


def says(text: str) -> str:
    """Return what a recipe is for: the first sentence of its comment, below the command that runs it."""
    lines = itertools.takewhile(lambda line: line.startswith("#"), text.splitlines()[1:])
    return " ".join(line.lstrip("# ") for line in lines).partition(". ")[0].removesuffix(".")
