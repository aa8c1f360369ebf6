"""The server as users start it, in processes of its own: for programs here and for tests."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
from evidence.revisions import ROOT

SMALL = (
    "--max-model-len=1024", "--block-size=32", "--kv-cache-memory-bytes=67108864", "--enforce-eager",
    "--skip-mm-profiling", "--max-num-seqs=32",
)  # fmt: skip
"""Options of vLLM for nano on a CPU: 64 MiB of K/V, nothing compiled."""

AROUND = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
AROUND |= {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_NO_USAGE_STATS": "1", "VLLM_LOGGING_LEVEL": "INFO"}
START_SECONDS, END_SECONDS = 300, 60


@dataclass(frozen=True)
class Server:
    """A server that runs.

    Attributes
    ----------
    address
        Without a path, such as ``http://127.0.0.1:8000``.
    process
        What was started; vLLM has processes below it.
    log
        What it says.
    """

    address: str
    process: subprocess.Popen[bytes]
    log: Path

    @property
    def port(self) -> int:
        """Its port."""
        return int(self.address.rpartition(":")[2])

    def below(self) -> list[psutil.Process]:
        """Return the processes below the first one, in the order of their start."""
        found: list[psutil.Process] = psutil.Process(self.process.pid).children(recursive=True)
        return sorted(found, key=lambda process: float(process.create_time()))

    def engine(self) -> psutil.Process:
        """Return vLLM's engine: the process that it has named so."""
        for process in self.below():
            if "EngineCore" in " ".join([process.name(), *process.cmdline()]):
                return process
        raise RuntimeError(f"the server has no engine of its own, see {self.log}")

    def resident_bytes(self) -> dict[str, int]:
        """Return the memory of each of its processes, by what they are: "server", "EngineCore", "Worker"."""
        found = {"server": int(psutil.Process(self.process.pid).memory_info().rss)}
        for process in self.below():
            with suppress(psutil.NoSuchProcess):
                name = process.name().rpartition(":")[2]
                found[name] = found.get(name, 0) + int(process.memory_info().rss)
        return found


def vllm_line(options: Sequence[str] = SMALL, model: str = "nano", port: int = 0) -> list[str]:
    """Return the command of the server with vLLM; it takes no port 0, so one that is free now is named."""
    given = ["--model", model, "--port", str(port or free_port()), "--dtype", "float32", "--", *options]
    return [sys.executable, "-m", "dynamic_llava", "serve", *given]


def stock_line(checkpoint: Path, options: Sequence[str] = SMALL) -> list[str]:
    """Return the command of vLLM's server on a checkpoint without a sparsifier, without anything of ours."""
    line = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(checkpoint)]
    named = ["--served-model-name", "nano", "--allowed-media-domains", "none.invalid", "--dtype", "float32"]
    return [*line, "--port", str(free_port()), "--host", "127.0.0.1", *named, *options]


def free_port() -> int:
    """Return a port that nobody listens at."""
    import socket

    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return int(listening.getsockname()[1])


@contextmanager
def running(line: Sequence[str], log: Path, **around: str) -> Iterator[Server]:
    """Run a server until the block ends, and leave none of its processes behind.

    Raises
    ------
    RuntimeError
        It ended, or did not begin to listen in time.
    """
    paths = os.pathsep.join(map(str, (ROOT / ".ci" / "vllm", ROOT / "src", ROOT)))
    environment = os.environ | AROUND | {"PYTHONPATH": paths} | around
    with log.open("wb") as said:
        process = subprocess.Popen(
            line, cwd=ROOT, env=environment, stdout=said, stderr=subprocess.STDOUT, start_new_session=True
        )
    try:
        yield Server(f"http://127.0.0.1:{_port(process, log)}", process, log)
    finally:
        _end(process)


def _port(process: subprocess.Popen[bytes], log: Path) -> int:
    """Wait until a server listens, and return its port."""
    address = re.compile(r"(?:running on|server on:?|Starting vLLM server on) (?:http://)?[\w.]+:(\d+)")
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        text = log.read_text(errors="replace")
        found = address.search(text)
        if found and ("startup complete" in text):
            return int(found[1])
        if process.poll() is not None:
            raise RuntimeError(f"the server ended with {process.returncode}:\n{text[-3000:]}")
        time.sleep(0.2)
    raise RuntimeError(f"the server did not begin in {START_SECONDS} s:\n{log.read_text()[-3000:]}")


def _end(process: subprocess.Popen[bytes]) -> None:
    """Ask a server to end, and end its whole session if it does not."""
    process.terminate()
    with suppress(subprocess.TimeoutExpired):
        process.wait(END_SECONDS)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
