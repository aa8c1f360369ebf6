"""What the repository holds: nothing large beside the weights of nano."""

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LARGEST = 1_000_000
WEIGHTS = Path("src/dynamic_llava/models/nano")


def test_no_large_file_is_tracked() -> None:
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        pytest.skip("no git repository here, such as in a source distribution")
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True)
    files = [Path(name) for name in listed.stdout.split("\0") if name]
    large = [
        path
        for path in files
        if (ROOT / path).is_file() and (ROOT / path).stat().st_size > LARGEST and path.parent != WEIGHTS
    ]
    assert large == []
