"""Run the tests of the core with other versions of transformers and torch, each in an environment of its own.

An environment lies over .venv: it holds only what its version changes, and all else is what constraints.txt
pins. It is made in seconds, stays in .venv-versions/ and is made anew when what it was made from changes.
The newest versions are asked for at every run.

    make test-versions
    make test-versions VERSIONS="5.19.0 newest" ARGS="-k golden"
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import tomllib
import venv
import xml.etree.ElementTree as ElementTree
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parents[1]
ROOM = ROOT / ".venv-versions"
TESTS = ("tests/core", "tests/families", "tests/methods", "tests/verification", "tests/checkpoints")
# What a version may bring along: no pin holds it, yet pip leaves it as it is where it fits.
FREE = {
    "transformers": {"transformers", "huggingface-hub", "hf-xet", "safetensors", "tokenizers"},
    "torch": {"torch"},
}
WORDS = """\
floor         the oldest transformers that pyproject.toml admits
pin           .venv itself: what constraints.txt pins
newest        the newest transformers that pyproject.toml admits
5.19.0        that version of transformers
newest-torch  the newest torch, with all that it requires: several GB where it brings CUDA
torch-2.14.1  that version of torch"""
ASK = "import json, torch, transformers; print(json.dumps([transformers.__version__, torch.__version__]))"


@dataclass(frozen=True)
class Wanted:
    """One environment: the package that it changes, and to what (nothing for the pin)."""

    word: str
    package: str = ""
    requirement: str = ""

    @property
    def is_newest(self) -> bool:
        """Whether another version may be wanted tomorrow."""
        return self.word.startswith("newest")

    @property
    def name(self) -> str:
        """Its folder: words that mean the same version share it."""
        exact = self.requirement.partition("==")[2]
        return f"{self.package}-{exact or 'newest'}"


@dataclass(frozen=True)
class Outcome:
    """What the tests of one environment said."""

    word: str
    transformers: str
    torch: str
    code: int
    counts: dict[str, int]
    seconds: float


def wanted(word: str) -> Wanted:
    """Return what a word of ``--versions`` asks for."""
    if word == "pin":
        return Wanted(word)
    if word == "floor":
        floor = re.search(r">=\s*([0-9.]+)", admitted("transformers"))
        assert floor, "pyproject.toml names no oldest transformers"
        return Wanted(word, "transformers", f"transformers=={floor[1]}")
    if word in ("newest", "newest-torch"):
        package = "torch" if word == "newest-torch" else "transformers"
        return Wanted(word, package, admitted(package))
    found = re.fullmatch(r"(torch-)?([0-9][0-9a-z.+]*)", word)
    if found is None:
        print(f"error: VERSIONS has {word!r}, which is none of\n{WORDS}", file=sys.stderr)
        raise SystemExit(2)
    package = "torch" if found[1] else "transformers"
    return Wanted(word, package, f"{package}=={found[2]}")


def admitted(package: str) -> str:
    """Return what pyproject.toml requires of a package, such as ``torch>=2.9``."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    required: list[str] = project["dependencies"]
    return next(line for line in required if re.split(r"[<>=!~ ]", line)[0] == package)


def interpreter(want: Wanted) -> Path:
    """Return the Python of an environment, made or brought up to date as needed."""
    base = ROOT / ".venv" / "bin" / "python"
    if not want.requirement:
        return base
    folder, pins = ROOM / want.name, constraints(want.package)
    python, stamp = folder / "bin" / "python", folder / "made-from.txt"
    made_from = sha256(f"{want.requirement}\n{pins}\n{site(base).resolve()}".encode()).hexdigest()
    is_made = stamp.exists() and stamp.read_text(encoding="utf-8") == made_from
    if is_made and not want.is_newest:
        return python
    if not is_made:
        print(f"making {folder.relative_to(ROOT)}", flush=True)
        shutil.rmtree(folder, ignore_errors=True)
        venv.create(folder, with_pip=True, symlinks=True)
        (site(python) / "base.pth").write_text(f"{ROOT / 'src'}\n{site(base)}\n", encoding="utf-8")
    with tempfile.NamedTemporaryFile("w", suffix=".txt", encoding="utf-8") as file:
        file.write(pins)
        file.flush()
        pip = [str(python), "-m", "pip", "install", "-qq", "--disable-pip-version-check", "--upgrade"]
        installed = subprocess.run(
            [*pip, "--constraint", file.name, want.requirement], stderr=subprocess.PIPE, text=True
        )
    if installed.returncode:
        reason = installed.stderr.strip().splitlines()[-1].removeprefix("ERROR: ")
        raise SystemExit(f"error: pip could not install {want.requirement}: {reason}")
    stamp.write_text(made_from, encoding="utf-8")
    return python


def constraints(package: str) -> str:
    """Return constraints.txt without the pins that a version of ``package`` may have to break."""
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    free = FREE[package]
    return "\n".join(line for line in lines if line.partition("==")[0].lower().replace("_", "-") not in free)


def site(python: Path) -> Path:
    """Return where an interpreter's packages lie."""
    return Path(said(python, "import sysconfig; print(sysconfig.get_path('purelib'))"))


def said(python: Path, code: str) -> str:
    """Return what an interpreter prints."""
    return subprocess.run([python, "-c", code], check=True, capture_output=True, text=True).stdout.strip()


def run(word: str, python: Path, options: list[str]) -> Outcome:
    """Run pytest in one environment."""
    transformers, torch = json.loads(said(python, ASK))
    print(f"\n{word}: transformers {transformers}, torch {torch}", flush=True)
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        # pytest's cache stays what the last run in .venv left.
        command = [str(python), "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={report}"]
        environment = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
        code = subprocess.run([*command, *options], cwd=ROOT, env=environment).returncode
        counts = counted(report) if report.exists() else {}
    return Outcome(word, transformers, torch, code, counts, time.monotonic() - start)


def counted(report: Path) -> dict[str, int]:
    """Return how many tests passed, failed and were skipped, from a JUnit file."""
    suite = ElementTree.parse(report).getroot().find("testsuite")
    assert suite is not None, "pytest wrote a JUnit file without a suite"
    total, failures, errors, skipped = (
        int(suite.attrib[key]) for key in ("tests", "failures", "errors", "skipped")
    )
    failed = failures + errors
    return {"passed": total - failed - skipped, "failed": failed, "skipped": skipped}


def show(outcomes: list[Outcome]) -> Table:
    """Return the table of all environments."""
    counts = ("passed", "failed", "skipped")
    table = Table("asked for", "transformers", "torch", *counts, "seconds", "")
    for outcome in outcomes:
        numbers = [str(outcome.counts.get(name, "–")) for name in counts]
        verdict = "ok" if outcome.code == 0 else f"exit code {outcome.code}"
        table.add_row(
            outcome.word, outcome.transformers, outcome.torch, *numbers, f"{outcome.seconds:.0f}", verdict
        )
    return table


def main() -> int:
    """Run every environment asked for; the exit code is 1 if tests failed in any."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, epilog=WORDS
    )
    parser.add_argument("--versions", required=True, help="words, separated by spaces; see below")
    parser.add_argument(
        "pytest",
        nargs="*",
        help=f"options and paths for pytest; without a path: {' '.join(TESTS)}, those that are not slow",
    )
    options = parser.parse_args()
    given = options.pytest
    if not any(argument and (ROOT / argument.partition("::")[0]).exists() for argument in given):
        given = ["-m", "not slow", *TESTS, *given]
    pythons = {want.word: interpreter(want) for want in map(wanted, options.versions.split())}
    outcomes = [run(word, python, given) for word, python in pythons.items()]
    Console(width=110).print(show(outcomes))
    return int(any(outcome.code for outcome in outcomes))


if __name__ == "__main__":
    sys.exit(main())
