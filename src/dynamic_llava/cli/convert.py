"""``dynamic-llava convert``: from the official format to transformers', and back."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from dynamic_llava.cli.options import Json
from dynamic_llava.cli.output import print_json
from dynamic_llava.files import check_folder


class Format(StrEnum):
    """What is written."""

    TRANSFORMERS = "transformers"
    OFFICIAL = "official"


def command(
    source: Annotated[
        str, typer.Argument(help="Folder of the checkpoint, or its name on the hub.", metavar="SRC")
    ],
    out: Annotated[Path, typer.Argument(help="Folder to write.", metavar="OUT")],
    to: Annotated[
        Format, typer.Option("--to", help="Format to write; the checkpoint is in the other one.")
    ] = Format.TRANSFORMERS,
    dtype: Annotated[
        str | None,
        typer.Option(
            help="float32, float16 or bfloat16. Default: each tensor keeps its own.", show_default=False
        ),
    ] = None,
    vision_tower: Annotated[
        str | None,
        typer.Option(help="Folder or hub name of the vision tower. Default: where the checkpoint says."),
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Replace all that OUT holds, even what convert did not write.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Convert a checkpoint from the official format (LLaVA, Dynamic-LLaVA) to that of transformers, or back.

    Example: dynamic-llava convert nano nano-official --to official
    """
    check_folder("OUT", out)

    from dataclasses import asdict

    import torch
    from rich.console import Console
    from rich.progress import Progress

    from dynamic_llava.checkpoints import convert

    dtypes = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
    if dtype is not None and dtype not in dtypes:
        raise ValueError(f"--dtype is {dtype!r}: choose float32, float16 or bfloat16")
    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("converting", total=None)
        done = convert(
            source,
            out,
            to.value,
            dtypes[dtype] if dtype else None,
            vision_tower,
            progress=lambda count, total: bar.update(task, completed=count, total=total),
            force=force,
        )
    if as_json:
        print_json(asdict(done) | {"folder": str(done.folder)})
    else:
        beside = " and its sparsifier" if done.has_sparsifier else ""
        typer.echo(f"{done.folder}: {done.tensors} tensors{beside}, {done.bytes / 1e6:,.1f} MB")
