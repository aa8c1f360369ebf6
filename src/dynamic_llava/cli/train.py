"""``dynamic-llava train``: one stage, as its recipe says."""

from __future__ import annotations

from typing import Annotated

import typer

from dynamic_llava.cli.options import Json
from dynamic_llava.cli.output import print_json
from dynamic_llava.files import check_folder
from dynamic_llava.training import bundled


def command(
    recipe: Annotated[str, typer.Argument(help="File of a recipe, or the name of a bundled one.")],
    resume: Annotated[bool, typer.Option("--resume", help="Continue from the last checkpoint.")] = False,
    allow_changes: Annotated[
        bool,
        typer.Option("--allow-changes", help="Resume even though the recipe or its data have changed."),
    ] = False,
    dry: Annotated[
        bool,
        typer.Option(
            "--dry-run", help="Only show parameters, steps, memory, work and disk space; write nothing."
        ),
    ] = False,
    as_json: Json = False,
) -> None:
    """Train one stage, as its recipe says. For several GPUs: accelerate launch -m dynamic_llava train.

    Example: dynamic-llava train nano-vision --dry-run
    """
    path = bundled.find(recipe)

    from dynamic_llava.training import run
    from dynamic_llava.training.recipe import Recipe

    if not dry:
        check_folder(f"output in {path}", Recipe.read(path).run.output)
        folder = run.train(path, resume=resume, allow_changes=allow_changes)
        print_json({"model": str(folder)}) if as_json else typer.echo(folder)
        return
    plan = run.dry_run(path)
    if as_json:
        print_json(plan.as_json())
        return
    from rich.console import Console

    for table in plan.tables():
        Console().print(table)
