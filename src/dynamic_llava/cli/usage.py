"""How a mistake ends on the command line: one line on stderr and exit code 2; Ctrl-C ends with 130."""

from __future__ import annotations

from typing import Any

import typer
from typer.core import TyperGroup


class Commands(TyperGroup):
    """Ends a user's mistake with one line on stderr and exit code 2, and Ctrl-C with 130."""

    def parse_args(self, ctx: Any, args: list[str]) -> Any:
        """Read the program's own options."""
        try:
            return super().parse_args(ctx, args)
        except typer.TyperException as error:
            _refuse_usage(ctx, error)

    def invoke(self, ctx: Any) -> Any:
        """Run a command; turn what it raises into one line and an exit code."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as error:
            typer.echo("interrupted", err=True)
            raise typer.Exit(130) from error
        except typer.TyperException as error:
            _refuse_usage(ctx, error)
        except (ValueError, OSError, ImportError, ArithmeticError) as error:
            if ctx.params["traceback"]:
                raise
            _refuse(str(error), error)


def _refuse_usage(ctx: Any, error: typer.TyperException) -> None:
    command = " ".join(filter(None, [ctx.command_path, ctx.invoked_subcommand]))
    _refuse(f"{error.format_message()} See: {command} --help", error)


def _refuse(message: str, error: Exception) -> None:
    typer.echo("error: " + " ".join(message.split()), err=True)
    raise typer.Exit(2) from error
