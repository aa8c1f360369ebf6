"""``dynamic-llava demo``: bundled pictures, answered dense and sparse."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dynamic_llava.cli.model import load
from dynamic_llava.cli.options import Device, Dtype, Json, Model
from dynamic_llava.cli.output import print_json
from dynamic_llava.files import check_folder


def command(
    out: Annotated[Path, typer.Option(help="Folder to write pictures of what was kept to.")] = Path("demo"),
    model: Model = "nano",
    device: Device = None,
    dtype: Dtype = None,
    as_json: Json = False,
) -> None:
    """Answer bundled questions with and without dropping tokens, and show what was kept and saved.

    Example: dynamic-llava demo --out demo
    """
    check_folder("--out", out)

    from rich.console import Console

    from dynamic_llava.chat import side_by_side

    items = side_by_side.run(*load(model, device, dtype), side_by_side.requests(), out)
    shown = side_by_side.present(items, Console(stderr=as_json))
    if as_json:
        print_json(side_by_side.as_json(shown))
