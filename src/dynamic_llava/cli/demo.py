"""``dynamic-llava demo``: bundled pictures, answered dense and sparse."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer

from dynamic_llava.cli.model import load
from dynamic_llava.cli.options import ChosenModel, Device, Dtype, Json
from dynamic_llava.cli.output import print_json
from dynamic_llava.files import check_folder


def command(
    out: Annotated[Path, typer.Option(help="Folder to write pictures of what was kept to.")] = Path("demo"),
    model: ChosenModel = None,
    device: Device = None,
    dtype: Dtype = None,
    as_json: Json = False,
) -> None:
    """Answer bundled questions with and without dropping tokens, and show what was kept and saved.

    Where photo is installed and no model is named, nano sees the drawn pictures and photo the photographs.

    Example: dynamic-llava demo --out demo
    """
    check_folder("--out", out)

    from rich.console import Console

    from dynamic_llava import photo
    from dynamic_llava.chat import side_by_side
    from dynamic_llava.sparsifier import sparsifier_of

    def items() -> Iterator[side_by_side.Item]:
        loaded = load(model or "nano", device, dtype)
        yield from side_by_side.run(*loaded, side_by_side.requests(), out)
        if model is not None or not photo.is_installed():
            return
        loaded = load("photo", device, dtype)
        if sparsifier_of(loaded[0]) is None:
            typer.echo("note: the installed photo has no predictors, so no photographs are shown", err=True)
            return
        yield from side_by_side.run(*loaded, side_by_side.photographs(), out)

    shown = side_by_side.present(items(), Console(stderr=as_json))
    if as_json:
        print_json(side_by_side.as_json(shown))
