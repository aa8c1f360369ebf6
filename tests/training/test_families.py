"""Recipes train every family: its own template, processor, pictures and predictors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from evidence.tiny_processors import KINDS
from PIL import Image
from tests.families import trained

import dynamic_llava
from dynamic_llava.chat.asking import ask
from dynamic_llava.training import run

SIZES = ((32, 30), (16, 33), (40, 20))


def write(folder: Path, kind: str, **changes: Any) -> Path:
    """A recipe on six conversations: of one picture, of two in two turns, and of text alone."""
    for number, size in enumerate(SIZES):
        Image.new("RGB", size, ("red", "blue", "green")[number]).save(folder / f"{number}.png")
    entries = []
    for number in range(6):
        pictures = [f"{(number + more) % 3}.png" for more in range(number % 3)]
        values: list[str] = []
        for picture in pictures or [""]:
            values += ["<image>\nwhat colour?" if picture else "and?", "it is a deep red, I think. " * 3]
        turns = [{"from": ("human", "gpt")[place % 2], "value": value} for place, value in enumerate(values)]
        entries.append({"id": str(number), "image": pictures, "conversations": turns})
    (folder / "talk.json").write_text(json.dumps(entries))
    sparsity = {"layer": 2, "d_model": 16, "nhead": 2, "dim_feedforward": 32, "min_answer_length": 8}
    recipe: dict[str, Any] = {
        "stage": {"name": "dynamic", "init": str(trained.checkpoint(kind, folder / "base"))},
        "data": {"conversations": {"path": str(folder / "talk.json")}, "batch_size": 3},
        "optimizer": {"learning_rate": 1e-3},
        "method": {"sparsity": sparsity, "train": "predictors", "calibration_steps": 1},
        "run": {"output": str(folder / "out"), "steps": 2, "save_every": 2},
    }
    for place, value in changes.items():
        section, _, name = place.partition("_")
        recipe[section][name] = value
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return path


def logged(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / run.LOG).read_text().splitlines()]


@pytest.mark.parametrize("kind", KINDS)
def test_predictors_are_trained_and_load_with_their_base(kind: str, tmp_path: Path) -> None:
    folder = run.train(write(tmp_path, kind))
    rows = logged(folder.parent)
    assert all(0 < row["image_kept"] <= 1 for row in rows)
    assert all(row["grad_norm"] > 0 for row in rows)
    model, processor = dynamic_llava.load(folder)
    assert processor is not None
    base = trained.model(kind).state_dict()
    kept = {name: tensor for name, tensor in model.state_dict().items() if "sparsifier" not in name}
    assert all(torch.equal(base[name], tensor) for name, tensor in kept.items())
    model.sparsifier.config.image_keep_rate = 0.5
    reply = ask(model, processor, "what colour?", [Image.open(tmp_path / "0.png")], 4)
    assert reply.report is not None
    assert len(reply.report.image_kept[0])


@pytest.mark.parametrize("kind", ["llava_next-vicuna", "internvl", "qwen2_5_vl"])
def test_accumulated_batches_of_pictures_of_many_sizes_equal_one(kind: str, tmp_path: Path) -> None:
    found = []
    for batch, accumulate in ((6, 1), (2, 3)):
        folder = tmp_path / str(batch)
        folder.mkdir()
        made = run.train(write(folder, kind, data_batch_size=batch, data_accumulate=accumulate))
        found.append(logged(made.parent))
    for ours, theirs in zip(*found, strict=True):
        for name in ("loss", "image_kept", "text_kept", "grad_norm"):
            assert ours[name] == pytest.approx(theirs[name], rel=2e-3), name
