"""Assembles the pages of the docs site in ``build/docs``, where ``mkdocs.yml`` looks for them.

In the repository, pages lie where a reader looks for them, and link to each other and to files. The site has
them in one folder, so their links are changed to fit: a link to anything else leads to the repository.
The notebooks become pages too, and so does the help of the commands.
"""

from __future__ import annotations

import functools
import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

import typer
from typer.main import get_command

from dynamic_llava.cli import app

ROOT = Path(__file__).resolve().parents[1]
SITE = ROOT / "build/docs"
REPOSITORY = "https://github.com/dynamic-llava/dynamic-llava"
LINK = re.compile(r"(?P<picture>!?)\[(?P<text>[^\]]*)\]\((?!https?:|#)(?P<path>[^)#]+)(?P<anchor>#[^)]*)?\)")
CODE = re.compile(r"(^```.*?^```$)", re.DOTALL | re.MULTILINE)
NAMES = {"README.md": "index.md", "CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}
FOLDERS = ("docs/", "evidence/", "examples/")


@functools.cache
def pages() -> dict[str, str]:
    """Return where each file of the repository that becomes a page lies on the site."""
    found = [*NAMES]
    for pattern in ("docs/**/*.md", "docs/images/**/*.png", "evidence/*.md", "examples/*.ipynb"):
        found += sorted(path.relative_to(ROOT).as_posix() for path in ROOT.glob(pattern))
    return {path: _place(path) for path in found}


def assemble() -> None:
    """Write all pages anew."""
    shutil.rmtree(SITE, ignore_errors=True)
    for source, place in pages().items():
        target = SITE / place
        target.parent.mkdir(parents=True, exist_ok=True)
        if source.endswith(".png"):
            shutil.copyfile(ROOT / source, target)
        else:
            target.write_text(page(source), encoding="utf-8")
    (SITE / "commands.md").write_text("\n".join(commands()), encoding="utf-8")


def page(source: str) -> str:
    """Return the Markdown of a page whose links fit the site."""
    text = (ROOT / source).read_text(encoding="utf-8")
    if source.endswith(".ipynb"):
        text = "\n\n".join(cells(text)) + f"\n\n[This page as a notebook]({PurePosixPath(source).name})\n"
    return relinked(text, source)


def relinked(text: str, source: str) -> str:
    """Return the Markdown of the file ``source`` with its links fit for the site; code stays as it is."""
    parts = CODE.split(text)  # code is at the odd places
    parts[::2] = [LINK.sub(lambda link: _fit(link, source), part) for part in parts[::2]]
    return "".join(parts)


def cells(notebook: str) -> Iterator[str]:
    """Yield the Markdown of each cell of a notebook, code in fences; what the code prints is left out."""
    for cell in json.loads(notebook)["cells"]:
        text = "".join(cell["source"])
        yield text if cell["cell_type"] == "markdown" else f"```python\n{text}\n```"


def commands() -> Iterator[str]:
    """Yield the lines of a page that holds the help of every command."""
    yield "# Commands\n\nEvery command prints this text with `--help`."
    program = get_command(app)
    parent = typer.Context(program, info_name="dynamic-llava")
    for name, command in program.commands.items():  # type: ignore[attr-defined]
        text = command.get_help(typer.Context(command, info_name=name, parent=parent))
        yield f"\n## {name}\n\n```text\n{text}\n```"


def _place(path: str) -> str:
    if path in NAMES:
        return NAMES[path]
    folder = next(folder for folder in FOLDERS if path.startswith(folder))
    return path.removeprefix(folder).replace(".ipynb", ".md")


def _fit(link: re.Match[str], source: str) -> str:
    path = os.path.normpath(PurePosixPath(source).parent / link["path"])
    known = pages()
    if path in known and not (path == source and path.endswith(".ipynb")):
        start = PurePosixPath(known[source]).parent
        target = os.path.relpath(known[path], start)
    else:
        kind = "tree" if (ROOT / path).is_dir() else "blob"
        target = f"{REPOSITORY}/{kind}/main/{path}"
    return f"{link['picture']}[{link['text']}]({target}{link['anchor'] or ''})"


if __name__ == "__main__":
    assemble()
