"""How commands end early: a mistake with one line and exit code 2, Ctrl-C with 130, a lost reader with 1."""

from __future__ import annotations

import select
from typing import Any

import typer
from typer.core import TyperGroup

from dynamic_llava.files import first_line, one_line

EXTRAS = {"accelerate": "train", "peft": "train", "pydantic": "train", "yaml": "train", "nltk": "eval"}
"""Packages that are only needed by some, and the extra that brings each."""


class Commands(TyperGroup):
    """Ends a mistake, and whatever else stops a command, with one line and exit code 2, Ctrl-C with 130.

    Where nobody reads on, as in ``dynamic-llava flops | head -1``, it ends in silence with 1.
    """

    def parse_args(self, ctx: Any, args: list[str]) -> Any:
        """Read the program's own options."""
        try:
            return super().parse_args(ctx, args)
        except typer.TyperException as error:
            _refuse_usage(ctx, error)
        except OSError as error:  # the help cannot be written
            if isinstance(error, BrokenPipeError):
                raise
            _refuse(str(error), error)

    def invoke(self, ctx: Any) -> Any:
        """Run a command; turn what it raises into one line and an exit code."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as error:
            typer.echo("interrupted", err=True)
            raise typer.Exit(130) from error
        except typer.TyperException as error:
            _refuse_usage(ctx, error)
        except typer.Exit:
            raise
        except Exception as error:
            if ctx.params["traceback"] or (isinstance(error, BrokenPipeError) and _lost_reader()):
                raise  # typer meets a broken pipe in silence
            _refuse(_message(error), error)


def _refuse_usage(ctx: Any, error: typer.TyperException) -> None:
    command = " ".join(filter(None, [ctx.command_path, ctx.invoked_subcommand]))
    _refuse(f"{error.format_message()} See: {command} --help", error)


def _message(error: Exception) -> str:
    """Return what an error says; of one that nobody foresaw its kind and how to see more, too."""
    if isinstance(error, ModuleNotFoundError) and error.name in EXTRAS:
        return f"{error.name} is not installed: pip install 'dynamic-llava[{EXTRAS[error.name]}]'"
    if isinstance(error, ValueError | OSError | ImportError | ArithmeticError):
        return str(error)
    kind = type(error).__name__
    if isinstance(error, MemoryError) or kind == "OutOfMemoryError":  # torch's own: not imported here
        return f"out of memory: {first_line(error)}; ask for less at once, or take a smaller dtype"
    return f"{kind}: {first_line(error)}; dynamic-llava --traceback shows where it arose"


def _lost_reader() -> bool:
    """Return whether stdout or stderr is a pipe that nobody reads: other pipes may break too, in training."""
    streams = select.poll()
    for stream in (1, 2):
        streams.register(stream, 0)
    return any(event & select.POLLERR for _, event in streams.poll(0))


def _refuse(message: str, error: Exception) -> None:
    typer.echo("error: " + one_line(message), err=True)
    raise typer.Exit(2) from error
