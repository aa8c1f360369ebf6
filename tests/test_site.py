"""The docs site has every page, and its reference every public name."""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from docs import pages

yaml: Any = pytest.importorskip("yaml")

ROOT = Path(__file__).parents[1]
PUBLIC = [
    "dynamic_llava",
    *(f"dynamic_llava.{room}" for room in ("chat", "checkpoints", "families", "methods")),
]
MODULES = {"families", "methods"}


def navigated(entries: Any) -> Iterator[str]:
    match entries:
        case str():
            yield entries
        case list():
            for entry in entries:
                yield from navigated(entry)
        case dict():
            yield from navigated(list(entries.values()))


def test_every_page_is_in_the_navigation_once() -> None:
    settings = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
    listed = list(navigated(settings["nav"]))
    made = {place for place in pages.pages().values() if place.endswith(".md")} | {"commands.md"}
    assert sorted(listed) == sorted(made)


@pytest.mark.parametrize("package", PUBLIC)
def test_the_reference_has_every_public_name(package: str) -> None:
    texts = [path.read_text(encoding="utf-8") for path in (ROOT / "docs/reference").glob("*.md")]
    documented = {name for text in texts for name in re.findall(r"^::: \S+\.(\w+)$", text, re.MULTILINE)}
    public = set(importlib.import_module(package).__all__)
    assert public - MODULES - {"__version__"} <= documented


@pytest.mark.parametrize("source", [path for path in pages.pages() if not path.endswith(".png")])
def test_links_of_pages_lead_to_pages_or_into_the_repository(source: str) -> None:
    place = Path(pages.pages()[source])
    made = set(pages.pages().values()) | {"commands.md"}
    for target in re.findall(
        r"\]\((?!https?:|#)([^)#]+)", re.sub(r"```.*?```", "", pages.page(source), flags=re.S)
    ):
        assert (pages.SITE / place.parent / target).resolve().relative_to(pages.SITE).as_posix() in made
    for path in re.findall(rf"\]\({pages.REPOSITORY}/(?:blob|tree)/main/([^)#]+)", pages.page(source)):
        assert (ROOT / path).exists(), path


def test_code_is_not_taken_for_links() -> None:
    assert pages.relinked("```python\nlinks[0](model)\n```", "README.md") == "```python\nlinks[0](model)\n```"


def test_commands_have_their_help() -> None:
    text = "\n".join(pages.commands())
    assert "## generate\n\n```text\nUsage: dynamic-llava generate [OPTIONS]" in text
