"""``dynamic-llava verify``: the library against golden vectors of the official code."""

from __future__ import annotations

from enum import StrEnum
from importlib.resources import files
from pathlib import Path
from typing import Annotated

import typer

from dynamic_llava.cli.options import Device, Dtype, Json
from dynamic_llava.cli.output import print_json


class Attention(StrEnum):
    """Attention implementations that are compared."""

    SDPA = "sdpa"
    EAGER = "eager"


def command(
    folder: Annotated[
        Path | None,
        typer.Argument(
            metavar="DIR",
            help="Golden files beside their checkpoint/, or folders of such. Default: the bundled ones, of "
            "the masked attention alone.",
            show_default=False,
        ),
    ] = None,
    attention: Annotated[Attention, typer.Option(help="Attention of the models.")] = Attention.SDPA,
    device: Device = None,
    dtype: Dtype = None,
    as_json: Json = False,
) -> None:
    """Compare the library with arrays computed by the official code. The exit code is 1 if any differs.

    Example: dynamic-llava verify
    """
    from rich.console import Console
    from rich.progress import track

    from dynamic_llava import verification
    from dynamic_llava.environment import default_device

    bar = Console(stderr=True)
    results = verification.verify(
        folder or Path(str(files("dynamic_llava") / "assets" / "vectors")),
        attention,
        default_device() if device is None else device,
        dtype,
        track=lambda paths: track(
            paths, "verifying", console=bar, transient=True, disable=not bar.is_terminal
        ),
    )
    outcome = verification.as_json(results)
    if as_json:
        print_json(outcome)
    else:
        Console().print(verification.table(results))
        typer.echo(", ".join(f"{count} {status}" for status, count in outcome["counts"].items()))
    if not outcome["passed"]:
        raise typer.Exit(1)
