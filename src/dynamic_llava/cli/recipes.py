"""``dynamic-llava recipes``: the recipes that come with the package, shown or copied."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dynamic_llava.cli.options import Json
from dynamic_llava.cli.output import print_json, say_written
from dynamic_llava.files import check_folder, replacing
from dynamic_llava.training import bundled


def command(
    name: Annotated[
        str | None, typer.Argument(help="Recipe to show. Without a name, all are listed.", show_default=False)
    ] = None,
    copy: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR", help="Copy this recipe, or all of them, to a folder.", show_default=False
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """List, show or copy the recipes that come with the package. `train` takes them by name as well.

    Example: dynamic-llava recipes llava-1.5-7b-predictors --copy recipes
    """
    paths = [bundled.bundled(one) for one in (bundled.names() if name is None else [name])]
    texts = {path.relative_to(bundled.folder()): path.read_text(encoding="utf-8") for path in paths}
    if copy is not None:
        check_folder("--copy", copy)
        written = _copied(texts, copy)
        say_written(*written)
        content: dict[str, object] = {"written": [str(path) for path in written]}
    elif name is not None:
        (text,) = texts.values()
        content = {"name": name, "text": text}
        if not as_json:
            typer.echo(text, nl=False)
    else:
        listed = {path.with_suffix("").as_posix(): bundled.says(text) for path, text in texts.items()}
        content = {"recipes": listed}
        if not as_json:
            _show(listed)
    if as_json:
        print_json(content)


def _show(listed: dict[str, str]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("recipe", "says", box=None)
    for name, sentence in listed.items():
        table.add_row(name, sentence)
    Console().print(table)


def _copied(texts: dict[Path, str], folder: Path) -> list[Path]:
    paths = {folder / path: text for path, text in texts.items()}
    for path in paths:
        if path.exists():
            raise ValueError(f"{path} exists already: remove it, or choose another folder")
    for path, text in paths.items():
        with replacing(path) as partial:
            partial.write_text(text, encoding="utf-8")
    return list(paths)
