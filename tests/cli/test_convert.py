"""``dynamic-llava convert``: what is refused before anything is loaded."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.command_line import Command, refused


@pytest.mark.parametrize("below", [(), ("model",)])
def test_bad_output(below: tuple[str, ...], command: Command, tmp_path: Path) -> None:
    taken = tmp_path / "taken"
    taken.touch()
    line = refused(command, "convert", "no-such-model", taken.joinpath(*below))
    assert f"OUT: {taken} is no folder that can be written to" in line
