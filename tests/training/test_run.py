"""The loop: a resumed run equals an unbroken one, and a broken one never leaves a broken checkpoint."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from dynamic_llava.training import run

RECIPE = """
stage: vision
output: {output}
steps: 4
scenes_per_step: 2
easy_vqa_per_step: 1
optimizer: muon
learning_rate: 0.001
save_every: 2
"""


def _recipe(folder: Path, name: str) -> Path:
    path = folder / f"{name}.yaml"
    path.write_text(RECIPE.format(output=folder / name))
    return path


def _losses(folder: Path) -> dict[int, float]:
    rows = [json.loads(line) for line in (folder / run.LOG).read_text().splitlines()]
    return {row["step"]: row["loss"] for row in rows}


class _Interrupted(Exception):
    pass


def test_resumed_run_equals_unbroken_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = run.train(_recipe(tmp_path, "whole")).parent
    broken = _recipe(tmp_path, "broken")
    step = run._step

    def stop_at_three(recipe, stage, optimizers, number):  # type: ignore[no-untyped-def]
        if number == 3:
            raise _Interrupted
        return step(recipe, stage, optimizers, number)

    with monkeypatch.context() as patch:
        patch.setattr(run, "_step", stop_at_three)
        with pytest.raises(_Interrupted):
            run.train(broken)
    resumed = run.train(broken, resume=True).parent
    assert _losses(resumed) == _losses(whole)
    ours, theirs = (torch.load(folder / run.CHECKPOINT) for folder in (resumed, whole))
    assert ours["step"] == theirs["step"] == 4
    for name, tensor in theirs["modules"]["model"].items():
        assert torch.equal(ours["modules"]["model"][name], tensor), name


def test_used_output_folder_is_refused_unless_resumed(tmp_path: Path) -> None:
    recipe = _recipe(tmp_path, "run")
    with pytest.raises(FileNotFoundError, match="nothing to resume"):
        run.train(recipe, resume=True)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "something").write_text("")
    with pytest.raises(ValueError, match="earlier run"):
        run.train(recipe)


def test_infinite_loss_stops_before_the_weights_change(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = run.STAGES["vision"]

    class Exploding(real):  # type: ignore[misc, valid-type]
        def backward(self, step: int) -> run.Metrics:
            return super().backward(step) | ({"loss": float("nan")} if step == 3 else {})

    monkeypatch.setitem(run.STAGES, "vision", Exploding)
    with pytest.raises(FloatingPointError, match="step 3"):
        run.train(_recipe(tmp_path, "run"))
    state = torch.load(tmp_path / "run" / run.CHECKPOINT)
    assert state["step"] == 2
    assert all(tensor.isfinite().all() for tensor in state["modules"]["model"].values())
