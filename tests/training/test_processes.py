"""The same losses from one batch, accumulated ones, and several processes; sharded runs resume."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tests.training.conftest import WriteRecipe

import dynamic_llava
from dynamic_llava.data import scenes
from dynamic_llava.training import run
from dynamic_llava.training.noise import SampleNoise


@pytest.fixture(scope="module")
def mix(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve conversations about drawn scenes; every fourth is text alone."""
    folder = tmp_path_factory.mktemp("mix")
    entries: list[dict[str, Any]] = []
    for number in range(12):
        sample = scenes.make(number, "train")
        turns = [*sample.turns[: 1 + number % 2], sample.turns[-1]]
        messages = []
        for turn in turns:
            messages += [{"from": "human", "value": turn.question}, {"from": "gpt", "value": turn.answer}]
        entry = {"id": f"s{number}", "conversations": messages}
        if number % 4:
            sample.open_image().save(folder / f"{number}.png")
            messages[0]["value"] = "<image>\n" + messages[0]["value"]
            entry["image"] = f"{number}.png"
        entries.append(entry)
    (folder / "mix.json").write_text(json.dumps(entries))
    return folder


@pytest.fixture
def write_mix(write_recipe: WriteRecipe, mix: Path) -> WriteRecipe:
    """Write a recipe that trains on conversations, one optimizer step for four of them."""

    def write(name: str, **changes: Any) -> Path:
        settings = {"data": {"path": str(mix / "mix.json")}, "steps": 3, "epochs": 2.0, "batch_size": 4}
        none = {"scenes_per_step": None, "easy_vqa_per_step": None}
        return write_recipe(name, **{**none, **settings, **changes})

    return write


def logged(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / run.LOG).read_text().splitlines()]


def assert_same_losses(folder: Path, other: Path) -> None:
    ours, theirs = logged(folder), logged(other)
    assert [row["step"] for row in ours] == [row["step"] for row in theirs]
    for row, expected in zip(ours, theirs, strict=True):
        for name in ("loss", "grad_norm", "image_kept", "text_kept"):
            assert row[name] == pytest.approx(expected[name], rel=1e-4, abs=1e-4), (row["step"], name)


def launched(recipe: Path, *launcher: str, resume: bool = False) -> Path:
    command = [*launcher, "-m", "dynamic_llava", "--traceback", "train", str(recipe)]
    done = subprocess.run(command + ["--resume"] * resume, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-3000:]
    return recipe.with_suffix("")


def torchrun(processes: int) -> list[str]:
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]


def test_noise_depends_on_the_sample_alone() -> None:
    def draw(rows: list[int], tokens: int, pictures: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        noise = SampleNoise(seed=3)
        noise.step = 5
        noise.begin(rows, pictures, spans=1)
        return noise(torch.empty(len(rows), tokens, 2)), noise(torch.empty(len(pictures), 7, 2))

    text, image = draw([4, 9, 2], 40, [0, 0, 2])
    alone, pictures = draw([2], 33, [0])
    assert torch.equal(alone[0], text[2, -33:])
    assert torch.equal(pictures[0], image[2])
    assert not torch.equal(image[0], image[1])
    assert text.min() > 0
    assert text.mean().item() == pytest.approx(1.0, abs=0.25)


@pytest.mark.parametrize(("batch", "accumulate"), [(2, 2), (1, 4)])
def test_accumulated_batches_equal_one(write_mix: WriteRecipe, batch: int, accumulate: int) -> None:
    whole = run.train(write_mix("whole")).parent
    parts = run.train(write_mix("parts", batch_size=batch, accumulate=accumulate)).parent
    assert_same_losses(parts, whole)


def test_skipped_entries_are_logged_and_reported(
    write_mix: WriteRecipe, mix: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    entries = json.loads((mix / "mix.json").read_text())
    entries[1]["image"] = "gone.png"
    path = tmp_path / "broken.json"
    path.write_text(json.dumps(entries))
    data = {"path": str(path), "images": str(mix), "on_error": "skip"}
    folder = run.train(write_mix("run", data=data)).parent
    assert logged(folder)[-1]["skipped_entries"] == 1
    assert "skipped: s1: " in capsys.readouterr().err
    with pytest.raises(ValueError, match=r"s1: .*gone.png: no such picture"):
        run.train(write_mix("strict", data=data | {"on_error": "raise"}))


@pytest.mark.slow
def test_two_processes_equal_one(write_mix: WriteRecipe) -> None:
    whole = run.train(write_mix("whole")).parent
    halves = launched(write_mix("halves", batch_size=2), *torchrun(2))
    assert_same_losses(halves, whole)
    dynamic_llava.load(halves / run.MODEL)


def sharded(recipe: Path, folder: Path, processes: int) -> tuple[list[float], dict[str, torch.Tensor]]:
    folder.mkdir(exist_ok=True)
    script = Path(__file__).with_name("sharded.py")
    command = [*torchrun(processes), str(script), str(recipe), str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads((folder / "losses.json").read_text()), load_file(folder / "full.safetensors")


@pytest.mark.slow
def test_two_shards_equal_one_process_and_resume(write_mix: WriteRecipe, tmp_path: Path) -> None:
    """FSDP2 itself: accelerate sets it up on GPUs only."""
    recipe = write_mix("run")
    losses, weights = sharded(recipe, tmp_path / "two", 2)
    expected, whole = sharded(recipe, tmp_path / "one", 1)
    assert losses == pytest.approx(expected, rel=1e-4)
    assert weights.keys() == whole.keys()
    resumed, again = sharded(recipe, tmp_path / "two", 2)
    assert resumed == pytest.approx(losses[1:], rel=1e-6)
    for name, tensor in weights.items():
        torch.testing.assert_close(tensor, whole[name], atol=1e-3, rtol=1e-3)
        torch.testing.assert_close(again[name], tensor, atol=1e-6, rtol=1e-5)
