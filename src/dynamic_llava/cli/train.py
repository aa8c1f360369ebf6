"""``dynamic-llava train``: one stage, as its recipe says."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dynamic_llava.cli.options import Json
from dynamic_llava.cli.output import print_json
from dynamic_llava.files import check_folder


def command(
    recipe: Annotated[Path, typer.Argument(help="A recipe; the shipped ones are in recipes/.")],
    resume: Annotated[bool, typer.Option("--resume", help="Continue from the last checkpoint.")] = False,
    allow_changes: Annotated[
        bool,
        typer.Option("--allow-changes", help="Resume although the recipe or its data have changed."),
    ] = False,
    dry: Annotated[
        bool, typer.Option("--dry-run", help="Only show parameters, tokens, steps and memory.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Train one stage as its recipe says; on several GPUs, with accelerate launch -m dynamic_llava train.

    Example: dynamic-llava train recipes/nano-dense.yaml --dry-run
    """
    from dynamic_llava.training import run
    from dynamic_llava.training.recipe import Recipe

    if not dry:
        check_folder(f"output in {recipe}", Recipe.read(recipe).run.output)
        folder = run.train(recipe, resume=resume, allow_changes=allow_changes)
        print_json({"model": str(folder)}) if as_json else typer.echo(folder)
        return
    plan = run.dry_run(recipe)
    if as_json:
        print_json(plan.as_json())
        return
    from rich.console import Console

    for table in plan.tables():
        Console().print(table)
