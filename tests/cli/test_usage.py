"""A mistake ends with one line on stderr and exit code 2; Ctrl-C ends with 130."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from tests.command_line import Command, refused

from dynamic_llava import cli


def test_interrupt(command: Command, picture: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(source: str) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli.model, "load", interrupted)
    outcome = command("generate", "--image", picture, "--prompt", "what?")
    assert (outcome.code, outcome.stdout, outcome.stderr) == (130, "", "interrupted\n")


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
        ((), "command"),
    ],
)
def test_bad_arguments(arguments: tuple[str, ...], message: str, command: Command) -> None:
    line = refused(command, *arguments)
    assert message in line
