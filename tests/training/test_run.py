"""Training: a resumed run equals an unbroken one, and no fault leaves a broken checkpoint behind."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from safetensors.torch import load_file
from tests.checkpoints import official_files
from tests.training.conftest import WriteRecipe

import dynamic_llava
from dynamic_llava import Sparsifier, SparsityConfig, checkpoints
from dynamic_llava.training import run, stages, trainer
from dynamic_llava.training.feeding import feed
from dynamic_llava.training.plan import Plan
from dynamic_llava.training.recipe import Recipe
from dynamic_llava.training.stages.dense import DenseObjective


def losses(folder: Path) -> dict[int, tuple[float, ...]]:
    """Everything logged but the time, by step."""
    rows = [json.loads(line) for line in (folder / run.LOG).read_text().splitlines()]
    return {row.pop("step"): tuple(v for k, v in sorted(row.items()) if k != "seconds") for row in rows}


def assert_same_model(folder: Path, other: Path) -> None:
    names = [path.name for path in (other / run.MODEL).glob("*.safetensors")]
    assert "sparsifier.safetensors" in names
    for name in names:
        ours, theirs = (load_file(f / run.MODEL / name) for f in (folder, other))
        assert ours.keys() == theirs.keys()
        for key, tensor in theirs.items():
            assert torch.equal(ours[key], tensor), key


class _Interrupted(Exception):
    pass


@pytest.mark.parametrize(
    ("optimizer", "train"), [("adamw", "full"), ("muon", "full"), ("adamw", "predictors")]
)
def test_resumed_run_equals_unbroken_run(
    write_recipe: WriteRecipe, monkeypatch: pytest.MonkeyPatch, optimizer: str, train: str
) -> None:
    whole = run.train(write_recipe("whole", optimizer=optimizer, train=train)).parent
    recipe = write_recipe("broken", optimizer=optimizer, train=train)
    forward = DenseObjective.logits
    calls = []

    def stop_in_step_four(self, group, **masks):  # type: ignore[no-untyped-def]
        calls.append(group)
        if len(calls) > 2 * 3:  # two groups a step
            raise _Interrupted
        return forward(self, group, **masks)

    with monkeypatch.context() as patch:
        patch.setattr(DenseObjective, "logits", stop_in_step_four)
        with pytest.raises(_Interrupted):
            run.train(recipe)
    assert max(losses(whole.parent / "broken")) == 3  # ran on after the checkpoint at 2
    resumed = run.train(recipe, resume=True).parent
    assert losses(resumed) == losses(whole)
    assert_same_model(resumed, whole)


@pytest.mark.slow
def test_killed_run_resumes_bit_for_bit(write_recipe: WriteRecipe) -> None:
    whole = run.train(write_recipe("whole", steps=6)).parent
    recipe = write_recipe("killed", steps=6)
    log = recipe.with_suffix("") / run.LOG
    command = [sys.executable, "-m", "dynamic_llava", "train", str(recipe)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 200
    while not (log.exists() and len(log.read_text().splitlines()) >= 3):
        assert process.poll() is None, "ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    resumed = run.train(recipe, resume=True).parent
    assert losses(resumed) == losses(whole)
    assert_same_model(resumed, whole)


def test_what_was_cut_off_is_not_resumed(write_recipe: WriteRecipe) -> None:
    recipe = write_recipe("run")
    folder = run.train(recipe).parent
    (folder / "checkpoint-4" / trainer.COMPLETE).unlink()
    (folder / "checkpoint-4" / "optimizer.pt").write_bytes(b"half")
    before = losses(folder)
    assert run.train(recipe, resume=True).parent == folder
    assert losses(folder) == before
    assert trainer.last_checkpoint(folder) == folder / "checkpoint-4"


def test_full_disk_ends_with_one_line_and_the_checkpoint_before(
    write_recipe: WriteRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = write_recipe("run")
    save = torch.save

    def full(content, path, *args, **kwargs):  # type: ignore[no-untyped-def]
        if "checkpoint-4" in str(path):
            Path(path).write_bytes(b"half")
            raise OSError(28, "No space left on device")
        save(content, path, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", full)
        with pytest.raises(OSError, match=r"checkpoint-4: .*No space left.*--resume"):
            run.train(recipe)
    folder = recipe.with_suffix("")
    assert trainer.last_checkpoint(folder) == folder / "checkpoint-2"
    assert not (folder / "checkpoint-4").exists()
    whole = run.train(write_recipe("whole")).parent
    assert_same_model(run.train(recipe, resume=True).parent, whole)


def test_infinite_loss_stops_before_the_weights_change(
    write_recipe: WriteRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward = DenseObjective.logits

    def explode(self, group, **masks):  # type: ignore[no-untyped-def]
        factor = float("nan") if self.noise.step == 3 else 1.0
        return forward(self, group, **masks) * factor

    monkeypatch.setattr(DenseObjective, "logits", explode)
    recipe = write_recipe("run")
    with pytest.raises(FloatingPointError, match=r"step 3.* then --resume --allow-changes$"):
        run.train(recipe)
    checkpoint = trainer.last_checkpoint(recipe.with_suffix(""))
    assert checkpoint is not None
    assert checkpoint.name == "checkpoint-2"
    assert all(tensor.isfinite().all() for tensor in load_file(checkpoint / "model.safetensors").values())


def test_infinite_loss_at_the_first_step_advises_no_resuming(
    write_recipe: WriteRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward = DenseObjective.logits

    def explode(self, group, **masks):  # type: ignore[no-untyped-def]
        return forward(self, group, **masks) * float("nan")

    recipe = write_recipe("run")
    with monkeypatch.context() as patch:
        patch.setattr(DenseObjective, "logits", explode)
        with pytest.raises(
            FloatingPointError, match=r"learning rate, then remove the folder and start again$"
        ):
            run.train(recipe)
    run.train(recipe)  # nothing but what a run is begun with was left


def test_full_disk_at_the_first_checkpoint_advises_no_resuming(
    write_recipe: WriteRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args, **kwargs):  # type: ignore[no-untyped-def]
        raise OSError(28, "No space left on device")

    recipe = write_recipe("run")
    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", full)
        with pytest.raises(OSError, match=r"free space, then remove the folder and start again$"):
            run.train(recipe)
    with pytest.raises(ValueError, match=r"holds an earlier run; remove the folder and start again$"):
        run.train(recipe)


def test_used_output_folder_is_refused_unless_resumed(write_recipe: WriteRecipe) -> None:
    recipe = write_recipe("run")
    with pytest.raises(FileNotFoundError, match="no complete checkpoint"):
        run.train(recipe, resume=True)
    recipe.with_suffix("").mkdir()
    (recipe.with_suffix("") / "something").write_text("")
    with pytest.raises(ValueError, match="earlier run"):
        run.train(recipe)


def test_checkpoint_of_another_recipe_is_refused(write_recipe: WriteRecipe) -> None:
    run.train(write_recipe("run"))
    with pytest.raises(ValueError, match="another recipe"):
        run.train(write_recipe("run", train="predictors"), resume=True)


def parameters(folder: Path, name: str) -> dict[str, torch.Tensor]:
    return load_file(folder / name)


@pytest.mark.parametrize("train", ["lora", "full"])
def test_what_is_trained_changes_and_nothing_else(
    write_recipe: WriteRecipe, small_checkpoint: Path, train: str
) -> None:
    folder = run.train(write_recipe("run", train=train, distill_weight=0.5))
    before, after = (parameters(f, "model.safetensors") for f in (small_checkpoint, folder))
    assert before.keys() == after.keys()
    changed = {name for name, tensor in before.items() if not torch.equal(tensor, after[name])}
    expected = {
        "lora": lambda name: "_proj" in name and "language_model" in name,
        "full": lambda name: "vision_tower" not in name,
    }[train]
    assert changed == {name for name in before if expected(name)}
    model = dynamic_llava.load_model(folder)
    assert len(model.sparsifier.config.text_margins) == 41


@pytest.mark.parametrize("train", ["predictors", "lora"])
def test_frozen_16_bit_weights_get_float32_updates(write_recipe: WriteRecipe, train: str) -> None:
    recipe = write_recipe(
        "run", train=train, init_dtype="bfloat16", precision="bfloat16", gradient_checkpointing=True
    )
    folder = run.train(recipe).parent
    trained = load_file(folder / "checkpoint-4" / "model.safetensors")
    assert {tensor.dtype for tensor in trained.values()} == {torch.float32}
    assert all(".sparsifier." in name or ".lora_" in name for name in trained)


def test_training_goes_on_from_trained_predictors(write_recipe: WriteRecipe) -> None:
    first = run.train(write_recipe("first"))
    recipe = write_recipe("second", init=str(first), learning_rate=1e-12, predictor_learning_rate=1e-12)
    second = run.train(recipe)
    before, after = (load_file(folder / "sparsifier.safetensors") for folder in (first, second))
    for name, tensor in before.items():
        torch.testing.assert_close(after[name], tensor, atol=0.2 if name.endswith("6.bias") else 1e-6, rtol=0)
    with pytest.raises(ValueError, match="another shape"):
        run.train(write_recipe("third", init=str(first), sparsity={"d_model": 32}))
    with pytest.raises(ValueError, match="the dense stage would lose"):
        run.train(write_recipe("fourth", init=str(first), stage="dense"))


def test_separate_adapters_leave_the_model_as_it_was(
    write_recipe: WriteRecipe, small_checkpoint: Path
) -> None:
    folder = run.train(write_recipe("run", train="lora", merge_lora=False))
    assert not (folder / "model.safetensors").exists()
    assert dynamic_llava.load_model(folder).name_or_path == str(small_checkpoint)
    assert (folder.parent / "lora" / "adapter_model.safetensors").is_file()


def test_evaluation_keeps_the_best_checkpoint(write_recipe: WriteRecipe) -> None:
    recipe = write_recipe("run", steps=6, evaluation={"every": 2, "steps": 2}, learning_rate=0.5)
    folder = run.train(recipe).parent
    rows = [json.loads(line) for line in (folder / run.LOG).read_text().splitlines()]
    found = {row["step"]: row for row in rows if "eval_loss" in row}
    assert sorted(found) == [2, 4, 6]
    assert 0 < found[2]["eval_image_kept"] <= 0.25
    best = min(found, key=lambda step: found[step]["eval_loss"])
    kept = load_file(folder / f"checkpoint-{best}" / "model.safetensors")
    saved = load_file(folder / run.MODEL / "model.safetensors")
    name = "language_model.model.norm.weight"
    assert torch.equal(saved[name], kept["model.model.language_model.norm.weight"])


def test_dry_run_counts_and_writes_nothing(write_recipe: WriteRecipe, small_checkpoint: Path) -> None:
    recipe = write_recipe("run", train="predictors")
    plan = run.dry_run(recipe)
    frozen = sum(t.numel() for t in parameters(small_checkpoint, "model.safetensors").values())
    assert list(plan.parameters) == ["predictors"]
    assert plan.frozen == frozen
    assert plan.steps == 4
    assert plan.tokens_per_sample > 3 * 36
    assert plan.memory_bytes["gradients"] == 4 * plan.parameters["predictors"][0]
    assert plan.memory_bytes["total"] == sum(v for k, v in plan.memory_bytes.items() if k != "total")
    assert not recipe.with_suffix("").exists()


@pytest.mark.parametrize("train", ["predictors", "lora", "full"])
@pytest.mark.parametrize("init", ["model", "predictors"])
def test_dry_run_needs_no_weights(
    write_recipe: WriteRecipe, small_checkpoint: Path, tmp_path: Path, train: str, init: str
) -> None:
    folder = Path(shutil.copytree(small_checkpoint, tmp_path / "bare"))
    if init == "predictors":
        sparsifier = Sparsifier(SparsityConfig(d_model=16, nhead=2, dim_feedforward=32), hidden_size=32)
        sparsifier.base_model = str(folder)
        sparsifier.save_pretrained(tmp_path / "alone")
    start = folder if init == "model" else tmp_path / "alone"
    changes = {"init": str(start), "init_dtype": "bfloat16", "gradient_checkpointing": True}
    path = write_recipe("run", train=train, distill_weight=0.5, **changes)
    recipe = Recipe.read(path)
    stage = stages.build(recipe)
    whole = Plan.of(recipe, stage.objective, feed(recipe, stage.model, stage.processor))
    (folder / "model.safetensors").unlink()
    assert run.dry_run(path) == whole


def test_dry_run_fetches_no_weights(
    write_recipe: WriteRecipe, small_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    def fetch(hub_id: str, *, allow_patterns: list[str], **_: Any) -> str:
        asked.extend(allow_patterns)
        return str(small_checkpoint)

    monkeypatch.setattr("dynamic_llava.hub.snapshot_download", fetch)
    run.dry_run(write_recipe("run", init="someone/base-7b"))
    assert "*.json" in asked
    assert not {"*.safetensors", "*.bin", "*"} & set(asked)


@pytest.mark.parametrize("copy", [True, False])
def test_dry_run_of_an_official_checkpoint(
    write_recipe: WriteRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, copy: bool
) -> None:
    folder = official_files.write(tmp_path / "official")
    official_files.write_tokenizer(folder)
    for weights in tmp_path.rglob("model.safetensors"):
        weights.unlink()
    if copy:  # a hub tower without its config in reach, but known
        config = official_files.config_of(folder) | {"mm_vision_tower": "openai/clip-vit-large-patch14-336"}
        official_files.write_config(folder, config)
        monkeypatch.setattr("dynamic_llava.hub.snapshot_download", Mock(side_effect=OSError("offline")))
    model, processor = checkpoints.load_skeleton(folder)
    assert all(p.is_meta for name, p in model.named_parameters() if not name.startswith("sparsifier."))
    assert processor.patch_size == model.config.vision_config.patch_size
    assert model.sparsifier.config.image_policy == "learned"


def test_disk_is_what_was_written(write_recipe: WriteRecipe) -> None:
    for train in ("predictors", "full"):
        recipe = write_recipe(train, train=train, sparsity={"d_model": 128, "dim_feedforward": 512})
        disk = run.dry_run(recipe).disk_bytes
        folder = run.train(recipe)
        written = {
            "model": sum(path.stat().st_size for path in folder.glob("*.safetensors")),
            "checkpoints": sum(
                path.stat().st_size
                for name in ("model.safetensors", "optimizer.pt")
                for path in folder.parent.glob(f"checkpoint-*/{name}")
            ),
        }
        for name, size in written.items():
            assert disk[name] == pytest.approx(size, rel=0.25), (train, name)


def test_work_and_memory_grow_with_the_recipe(write_recipe: WriteRecipe) -> None:
    plain, checked, taught = (
        run.dry_run(write_recipe(f"run{number}", train="predictors", **changes))
        for number, changes in enumerate([{}, {"gradient_checkpointing": True}, {"distill_weight": 0.5}])
    )
    assert checked.decoder_flops == taught.decoder_flops == pytest.approx(1.5 * plain.decoder_flops)
    assert checked.memory_bytes["activations"] < plain.memory_bytes["activations"]
    assert (plain.memory_bytes["teacher"], taught.memory_bytes["teacher"]) == (0, 4 * plain.frozen)
    assert plain.as_json()["hours_at_100_tflops"] >= 0
