"""Every module with a function named ``command`` is a command; the help comes at once and has examples."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from tests.command_line import Command
from typer.main import get_command
from typer.testing import CliRunner

import dynamic_llava
from dynamic_llava import cli

COMMANDS = sorted(get_command(cli.app).commands)


def test_a_file_is_a_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "carve.py").write_text("def command() -> None:\n    print('carved')\n")
    (tmp_path / "chisels.py").write_text("CHISELS = 3\n")
    monkeypatch.setattr(cli, "__path__", [*cli.__path__, str(tmp_path)])
    program = cli.build()
    for name in ("carve", "chisels"):
        del sys.modules[f"dynamic_llava.cli.{name}"]
    assert list(get_command(program).commands) == sorted([*COMMANDS, "carve"])
    outcome = CliRunner().invoke(program, ["carve"])
    assert (outcome.exit_code, outcome.stdout) == (0, "carved\n")


def test_files_are_the_commands() -> None:
    files = {path.stem: path.read_text(encoding="utf-8") for path in Path(cli.__file__).parent.glob("*.py")}
    assert sorted(name for name, text in files.items() if "\ndef command(" in text) == COMMANDS


def test_installed_program_prints_help() -> None:
    program = Path(sys.executable).with_name("dynamic-llava")
    if not program.exists():
        pytest.skip("the package is not installed, so there is no dynamic-llava program")
    done = subprocess.run([program, "--help"], capture_output=True, text=True, check=True, timeout=60)
    assert all(name in done.stdout for name in COMMANDS)
    assert done.stderr == ""


def test_help_does_not_wait_for_torch() -> None:
    code = (
        "import sys\nfrom dynamic_llava.cli import main\nsys.argv = ['dynamic-llava', '--help']\n"
        "try:\n    main()\nexcept SystemExit:\n    pass\nprint('torch' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout.splitlines()[-1] == "False"


def test_nothing_asked_shows_the_help(command: Command) -> None:
    assert command() == command("--help")
    assert command().code == 0


def test_version(command: Command) -> None:
    outcome = command("--version")
    assert (outcome.code, outcome.stdout) == (0, f"dynamic-llava {dynamic_llava.__version__}\n")


@pytest.mark.parametrize(
    ("words", "expected"),
    [("gen", ["generate"]), ("evaluate --task s", ["scenes"]), ("convert --for", ["--force"])],
)
def test_shells_complete_commands_options_and_values(words: str, expected: list[str]) -> None:
    asked = {
        "COMP_WORDS": f"dynamic-llava {words}",
        "COMP_CWORD": str(words.count(" ") + 1),
        "_DYNAMIC_LLAVA_COMPLETE": "complete_bash",
    }
    code = "from dynamic_llava.cli import app; app(prog_name='dynamic-llava')"
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
        env=os.environ | asked,
    )
    assert (done.stdout.split(), done.stderr) == (expected, "")


@pytest.mark.parametrize("name", COMMANDS)
def test_help_has_an_example(name: str, command: Command) -> None:
    outcome = command(name, "--help")
    assert outcome.code == 0
    assert f"Example: dynamic-llava {name}" in outcome.stdout
