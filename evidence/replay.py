"""Run the commands that made the committed results again: each stands in its file, under "command".

Each command writes its own file anew. Names are those of files in evidence/results and may be patterns;
without any, all run (a day on two cores, for evidence.json trains). From the repository's root:

    python -m evidence.replay equivalence
    python -m evidence.replay --list "bench-*"
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
from collections.abc import Sequence
from fnmatch import fnmatch
from pathlib import Path

from evidence.revisions import ROOT
from rich.console import Console
from rich.table import Table

RESULTS = Path("evidence") / "results"
PYTHON = [sys.executable, "-m"]
PROGRAMS = {"dynamic-llava": [*PYTHON, "dynamic_llava"], "python -m": PYTHON, "make": ["make"]}


def chosen(patterns: Sequence[str]) -> list[Path]:
    """Return the result files that patterns name, all without any.

    Raises
    ------
    ValueError
        If a pattern names none.
    """
    files = sorted((ROOT / RESULTS).glob("*.json"))
    for pattern in patterns:
        if not any(fnmatch(file.stem, pattern) for file in files):
            known = ", ".join(file.stem for file in files)
            raise ValueError(f"{RESULTS} has no {pattern}.json: name one of {known}")
    return [file for file in files if not patterns or any(fnmatch(file.stem, p) for p in patterns)]


def command(file: Path) -> str:
    """Return the command that a result file names.

    Raises
    ------
    ValueError
        If it names none, or one that does not write this file.
    """
    found = json.loads(file.read_text(encoding="utf-8")).get("command", "")
    if not any(found.startswith(f"{program} ") for program in PROGRAMS):
        raise ValueError(f"{file}: its command is {found!r}, which starts with none of {', '.join(PROGRAMS)}")
    own = f"--output {(RESULTS / file.name).as_posix()}"
    if own not in found and not found.startswith("make "):
        raise ValueError(f"{file}: its command, {found}, writes another file: it needs {own}")
    return str(found)


def run(line: str) -> int:
    """Run a command with this interpreter, in the repository's root; return its exit code."""
    program = next(name for name in PROGRAMS if line.startswith(f"{name} "))
    return subprocess.run([*PROGRAMS[program], *shlex.split(line.removeprefix(program))], cwd=ROOT).returncode


def main() -> int:
    """Run what was asked for; the exit code is 1 if a command failed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", help="result files without .json, or patterns; default: all")
    parser.add_argument("--list", action="store_true", help="print the commands, run none")
    options = parser.parse_args()
    try:
        lines = {file.stem: command(file) for file in chosen(options.names)}
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if options.list:
        print("\n".join(lines.values()))
        return 0
    codes = {}
    for number, (name, line) in enumerate(lines.items(), 1):
        print(f"{number} of {len(lines)}: {line}", file=sys.stderr)
        codes[name] = run(line)
    table = Table("result", "exit code")
    for name, code in codes.items():
        table.add_row(name, str(code))
    Console().print(table)
    return int(any(codes.values()))


if __name__ == "__main__":
    sys.exit(main())
