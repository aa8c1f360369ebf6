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


def test_a_folder_that_convert_did_not_write(command: Command, checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "config.json").write_text("{}")
    ask = ("convert", checkpoint, out, "--to", "official")
    line = refused(command, *ask)
    assert f"{out} holds config.json, which convert did not write" in line
    assert "--force" in line
    assert command(*ask, "--force").code == 0
    assert command(*ask).code == 0
