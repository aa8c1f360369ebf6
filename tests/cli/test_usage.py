"""A mistake ends with one line and exit code 2, Ctrl-C with 130, a reader that leaves with 1 in silence."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tests.command_line import Command, refused
from typer.main import get_command

from dynamic_llava import cli


def test_interrupt(command: Command, picture: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli.model, "load", interrupted)
    outcome = command("generate", "--image", picture, "--prompt", "what?")
    assert (outcome.code, outcome.stdout, outcome.stderr) == (130, "", "interrupted\n")


NANO = "--model nano"
GENERATE = f"generate --image scene-1 --prompt what? --max-new-tokens 3 {NANO}"
QUICK = ["", "--help", "--version", "flops", "flops --json", "methods", "methods --json"]
QUICK += [f"{name} --help" for name in sorted(get_command(cli.app).commands)]
SLOW = [GENERATE, f"{GENERATE} --json", "demo --out {room}", "convert nano {room}/official --to official"]
SLOW += ["evaluate --task scenes --limit 2", "verify"]


@pytest.mark.parametrize(
    "arguments", [*QUICK, *(pytest.param(line, marks=pytest.mark.slow) for line in SLOW)]
)
@pytest.mark.parametrize("of_both", [False, True])
def test_reader_that_leaves_is_met_in_silence(arguments: str, of_both: bool, tmp_path: Path) -> None:
    filled = arguments.format(room=tmp_path)
    reader, writer = os.pipe()
    os.close(reader)  # as `head -1` does, sooner or later
    with os.fdopen(writer, "w") as pipe:
        done = subprocess.run(
            [sys.executable, "-m", "dynamic_llava", *filled.split()],
            stdout=pipe,
            stderr=pipe if of_both else subprocess.PIPE,
            text=True,
            check=False,
            timeout=60,
        )
    assert (done.returncode, done.stderr or "") == (1, "")


def test_other_broken_pipes_are_told(
    command: Command, picture: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise BrokenPipeError("a worker is gone")

    monkeypatch.setattr(cli.model, "load", broken)
    assert "a worker is gone" in refused(command, "generate", "--image", picture, "--prompt", "what?")


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (KeyError("gone"), "error: KeyError: 'gone'; dynamic-llava --traceback shows where it arose\n"),
        (TypeError("a\nb \udce9"), "error: TypeError: a; dynamic-llava --traceback shows where it arose\n"),
        (ValueError("a\nb \udce9"), "error: a b \\udce9\n"),
        (MemoryError(), "error: out of memory: MemoryError; ask for less at once, or take a smaller dtype\n"),
        (torch.OutOfMemoryError("no 7 GiB"), "error: out of memory: no 7 GiB; ask for less at once"),
        (RecursionError("too deep"), "error: RecursionError: too deep; "),
    ],
    ids=lambda value: type(value).__name__,
)
def test_errors_that_nobody_foresaw_end_with_one_line_too(
    error: Exception, message: str, command: Command, picture: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise error

    monkeypatch.setattr(cli.model, "load", broken)
    line = refused(command, "generate", "--image", picture, "--prompt", "what?")
    assert line.startswith(message)


def test_a_package_that_is_missing_is_named_with_its_extra(
    command: Command, picture: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise ModuleNotFoundError("No module named 'yaml'", name="yaml")

    monkeypatch.setattr(cli.model, "load", broken)
    line = refused(command, "generate", "--image", picture, "--prompt", "what?")
    assert line == "error: yaml is not installed: pip install 'dynamic-llava[train]'\n"


def test_help_that_cannot_be_written() -> None:
    if not Path("/dev/full").exists():
        pytest.skip("there is no device that is always full")
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "dynamic_llava", "--help"],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
            timeout=60,
        )
    assert (done.returncode, done.stderr) == (2, "error: [Errno 28] No space left on device\n")


def test_traceback_on_request(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        sys, "argv", ["dynamic-llava", "--traceback", "generate", "--image", "no.png", "--prompt", "what?"]
    )
    with pytest.raises(FileNotFoundError, match=r"no\.png"):
        cli.main()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("evaluate", "--task", "riddles"), "riddles"),
        (("evaluate",), "--task"),
        (("evaluate", "--task", "scenes", "--limit", "0"), "--limit"),
        (("evaluate", "--task", "scenes", "--batch-size", "0"), "--batch-size"),
        (("generate", "--prompt", "what?"), "--image"),
        (("generate", "--image", "a.png"), "--prompt"),
        (("generate", "--image", "a.png", "--prompt", "what?", "--max-new-tokens", "0"), "--max-new-tokens"),
        (("generate", "--image", "a.png", "--prompt", "what?", "--wrong"), "--wrong"),
        (("train", "no-such-recipe.yaml"), "no-such-recipe.yaml"),
        (("train",), "recipe"),
        (("paint",), "paint"),
        (("--wrong",), "--wrong"),
    ],
)
def test_bad_arguments(arguments: tuple[str, ...], message: str, command: Command) -> None:
    line = refused(command, *arguments)
    assert message in line
