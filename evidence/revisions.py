"""The library at an earlier commit, beside the working tree: for programs here that compare the two.

A side is a folder with ``src/dynamic_llava``. It runs in a process of its own, with the evidence of the
working tree and the same interpreter, so that nothing but the library differs.
"""

from __future__ import annotations

import io
import json
import os
import shlex
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
BASE = "2881a65"
"""The last commit whose core had a decoder loop of its own."""


@contextmanager
def checked_out(revision: str) -> Iterator[Path]:
    """Yield a temporary folder with the library as it was at a commit.

    Raises
    ------
    SystemExit
        If the repository has no such commit, or there is no repository.
    """
    archived = subprocess.run(
        ["git", "archive", "--format=tar", f"{revision}^{{commit}}", "src"], cwd=ROOT, capture_output=True
    )
    if archived.returncode:
        reason = archived.stderr.decode().strip().splitlines()[-1]
        print(f"error: cannot read commit {revision!r} ({reason}): run this in a full clone", file=sys.stderr)
        raise SystemExit(2)
    with tempfile.TemporaryDirectory() as folder, tarfile.open(fileobj=io.BytesIO(archived.stdout)) as files:
        files.extractall(folder, filter="data")
        yield Path(folder)


def described() -> str:
    """Return the commit of the working tree, with ``-dirty`` where the library was edited since."""
    head = _git("rev-parse", "--short", "HEAD")
    return f"{head}-dirty" if _git("status", "--porcelain", "--", "src") else head


class Side:
    """A process with the library of one side; it answers each line that it is given with a line of JSON.

    Parameters
    ----------
    folder
        What :func:`checked_out` yields, or :data:`ROOT`.
    module
        What to run, as in ``python -m module``.
    arguments
        Of the command line.
    threads
        Threads of torch; None leaves the choice to it.
    """

    def __init__(
        self, folder: Path, module: str, arguments: Sequence[str] = (), threads: int | None = None
    ) -> None:
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(folder / "src"), str(ROOT)]),
            "OMP_WAIT_POLICY": "PASSIVE",  # threads that wait sleep, and leave the core to others
            "HF_HUB_OFFLINE": "1",
            **({} if threads is None else {"OMP_NUM_THREADS": str(threads)}),
        }
        self._command = [sys.executable, "-m", module, *arguments]
        self._process = subprocess.Popen(
            self._command, cwd=ROOT, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def __enter__(self) -> Side:
        return self

    def __exit__(self, *_: object) -> None:
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                pipe.close()
        self._process.wait()

    def ask(self, line: str) -> Any:
        """Send a line; return what the answer says.

        Raises
        ------
        SystemExit
            If the process ended instead.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with suppress(BrokenPipeError):
            self._process.stdin.write(line + "\n")
            self._process.stdin.flush()
        answer = self._process.stdout.readline()
        if not answer:
            raise SystemExit(
                f"error: {shlex.join(self._command)} ended with {self._process.wait()}, see above"
            )
        return json.loads(answer)


def serve(answer: Callable[[str], Any]) -> None:
    """Answer each line of stdin with a line of JSON: what the other end of a :class:`Side` does."""
    for line in sys.stdin:
        print(json.dumps(answer(line.rstrip("\n"))), flush=True)


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=ROOT, check=True, capture_output=True, text=True)
    return done.stdout.strip()
