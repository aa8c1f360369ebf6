"""The command line ``dynamic-llava``: a file a command, found in this folder.

A module here is a command of its own name if it has a function named ``command``; the others are helpers.
Answers and JSON go to stdout, progress and remarks to stderr. A user's mistake ends with exit code 2 and one
line. The heavy imports sit inside the commands, so that ``--help`` answers at once.
"""

from __future__ import annotations

import pkgutil
from importlib import import_module
from typing import Annotated

import typer

import dynamic_llava
from dynamic_llava.cli.usage import Commands


def build() -> typer.Typer:
    """Make the program from the modules of this folder, its commands in the order of the alphabet."""
    program = typer.Typer(cls=Commands, rich_markup_mode=None)
    program.callback(invoke_without_command=True)(_common)
    for name in sorted(found.name for found in pkgutil.iter_modules(__path__)):
        module = import_module(f"{__name__}.{name}")
        if hasattr(module, "command"):
            program.command(name)(module.command)
    return program


def _print_version(is_asked: bool) -> None:
    if is_asked:
        typer.echo(f"dynamic-llava {dynamic_llava.__version__}")
        raise typer.Exit()


def _common(
    context: typer.Context,
    traceback: Annotated[bool, typer.Option(help="Show where an error arose, not just one line.")] = False,
    show_version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Ask pictures questions with a sparse context: Dynamic-LLaVA."""
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


app = build()


def main() -> None:
    """Run the command line."""
    app()
