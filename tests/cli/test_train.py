"""``dynamic-llava train``: what is refused before anything is loaded."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.command_line import Command, refused

RECIPE = """
stage:
  name: dense
  init: no-such-model
data:
  drawn:
    scenes_per_step: 1
optimizer:
  learning_rate: 0.001
run:
  output: {output}
  steps: 1
"""


def test_bad_output(command: Command, tmp_path: Path) -> None:
    taken = tmp_path / "taken"
    taken.touch()
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(RECIPE.format(output=taken / "run"))
    line = refused(command, "train", recipe)
    assert f"output in {recipe}: {taken} is no folder that can be written to" in line


@pytest.mark.parametrize("resume", [True, False])
def test_allowing_changes_is_for_resuming(command: Command, tmp_path: Path, resume: bool) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(RECIPE.format(output=tmp_path / "run"))
    line = refused(command, "train", recipe, "--allow-changes", *["--resume"] * resume)
    assert ("no complete checkpoint to resume" if resume else "--allow-changes is for --resume") in line
