"""How commands end early: a mistake with one line and exit code 2, Ctrl-C with 130, a lost reader with 1."""

from __future__ import annotations

import select
from typing import Any

import typer
from typer.core import TyperGroup


class Commands(TyperGroup):
    """Ends a user's mistake with one line on stderr and exit code 2, Ctrl-C with 130.

    Where nobody reads on, as in ``dynamic-llava flops | head -1``, it ends in silence with 1.
    """

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
            if ctx.params["traceback"] or (isinstance(error, BrokenPipeError) and _lost_reader()):
                raise  # typer meets a broken pipe in silence
            _refuse(str(error), error)


def _refuse_usage(ctx: Any, error: typer.TyperException) -> None:
    command = " ".join(filter(None, [ctx.command_path, ctx.invoked_subcommand]))
    _refuse(f"{error.format_message()} See: {command} --help", error)


def _lost_reader() -> bool:
    """Return whether stdout or stderr is a pipe that nobody reads: other pipes may break too, in training."""
    streams = select.poll()
    for stream in (1, 2):
        streams.register(stream, 0)
    return any(event & select.POLLERR for _, event in streams.poll(0))


def _refuse(message: str, error: Exception) -> None:
    typer.echo("error: " + " ".join(message.split()), err=True)
    raise typer.Exit(2) from error
