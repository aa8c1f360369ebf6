"""The house stands: imports go down the floors only, and no file imports itself by a detour."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1] / "src" / "dynamic_llava"
FLOORS = [  # from the top down; rooms of one floor do not import each other
    {"__main__"},
    {"cli", "lmms"},
    {"page"},
    {"vllm"},
    {"bench", "evaluation", "training", "verification"},
    {"checkpoints", "data"},
    {"chat", "photo"},
    {"sparsifier"},
    {"core"},
    {"costs", "adapter"},
    {"card"},
    {"methods", "families", "hub"},
    {"config", "environment", "files"},
]


def modules() -> dict[str, Path]:
    """Every module by its dotted name below the package; a package goes by its own name."""
    paths = {path.relative_to(ROOT).with_suffix("").as_posix(): path for path in ROOT.rglob("*.py")}
    return {name.removesuffix("/__init__").replace("/", "."): path for name, path in paths.items()}


MODULES = modules()


def imported(path: Path) -> set[str]:
    """Modules of the package that a file imports, anywhere in it, also for types alone."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("dynamic_llava"):
            home = (node.module or "").removeprefix("dynamic_llava").removeprefix(".")
            for alias in node.names:
                name = f"{home}.{alias.name}" if home else alias.name
                found.add(name if name in MODULES else home)
    return found & (MODULES.keys() - {""})


GRAPH = {name: imported(path) for name, path in MODULES.items() if name not in ("", "__init__")}


def floor_of(name: str) -> int:
    room = name.partition(".")[0]
    return next(number for number, rooms in enumerate(FLOORS) if room in rooms)


@pytest.mark.parametrize("name", sorted(GRAPH))
def test_imports_go_down(name: str) -> None:
    room = name.partition(".")[0]
    for other in GRAPH[name]:
        its = other.partition(".")[0]
        assert its == room or floor_of(other) > floor_of(name), (name, other)


def test_no_circle() -> None:
    done: set[str] = set()

    def visit(name: str, way: tuple[str, ...]) -> None:
        assert name not in way, " -> ".join((*way[way.index(name) :], name))
        if name not in done:
            for other in sorted(GRAPH.get(name, ())):
                visit(other, (*way, name))
            done.add(name)

    for name in sorted(GRAPH):
        visit(name, ())


def test_the_package_root_is_small() -> None:
    assert len([path for path in ROOT.iterdir() if path.is_file()]) <= 12
