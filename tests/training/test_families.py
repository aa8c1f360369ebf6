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
from tests.families.models import CASES

import dynamic_llava
from dynamic_llava import checkpoints, families
from dynamic_llava.chat.asking import ask
from dynamic_llava.training import run, stages
from dynamic_llava.training.recipe import Recipe

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


@pytest.mark.parametrize("kind", ["llava_next-vicuna", "qwen2_5_vl", "idefics3"])
@pytest.mark.parametrize("stage", ["dense", "full"])
def test_whole_models_are_trained_and_saved(kind: str, stage: str, tmp_path: Path) -> None:
    path = write(tmp_path, kind, method_train="full")
    recipe = yaml.safe_load(path.read_text())
    if stage == "dense":
        recipe["stage"]["name"] = "dense"
        del recipe["method"]
    path.write_text(yaml.safe_dump(recipe))
    model, processor = dynamic_llava.load(run.train(path))
    assert processor is not None
    assert (getattr(model, "sparsifier", None) is None) == (stage == "dense")
    base, trained_state = trained.model(kind).state_dict(), model.state_dict()
    decoder = [name for name in base if ".layers.0." in name and "proj" in name and "vision" not in name]
    assert decoder
    assert not any(torch.equal(base[name], trained_state[name]) for name in decoder if "visual" not in name)


@pytest.mark.parametrize("data", ["drawn", "photographs"])
def test_data_in_the_layout_of_llava_is_refused_for_others(data: str, tmp_path: Path) -> None:
    path = write(tmp_path, "llava_next-vicuna")
    recipe = yaml.safe_load(path.read_text())
    recipe["data"] = {"drawn": {"drawn": {"scenes_per_step": 1}}, "photographs": {"photographs": {
        "captions": "c.jsonl", "features": "f", "captions_per_step": 1}}}[data]  # fmt: skip
    path.write_text(yaml.safe_dump(recipe))
    with pytest.raises(
        ValueError, match=rf"^data\.{data} makes rows for LLaVA-1\.5 alone, and .*: give data"
    ):
        run.train(path)


def test_a_decoder_of_text_is_refused(tmp_path: Path) -> None:
    checkpoints.save(CASES["llama"].model(), None, tmp_path / "text")
    path = write(tmp_path, "llava_next-vicuna", stage_init=str(tmp_path / "text"))
    with pytest.raises(ValueError, match=r"a decoder of text, and this is for models that take pictures"):
        run.train(path)


def test_adapters_are_put_into_the_decoder_alone(tmp_path: Path) -> None:
    for kind in ("idefics3", "gemma3"):
        (tmp_path / kind).mkdir()
        path = write(tmp_path / kind, kind, method_train="lora")
        built = stages.build(Recipe.read(path))
        names = [name for name, parameter in built.objective.named_parameters() if ".lora_" in name]
        decoder = f".{families.family_of(built.model).decoder}.layers."
        assert names
        assert all(decoder in name for name in names)


@pytest.mark.parametrize("kind", KINDS)
def test_tower_and_projector_are_frozen_as_the_recipe_says(kind: str, tmp_path: Path) -> None:
    recipe = Recipe.read(write(tmp_path, kind))
    settings = recipe.model_dump() | {"method": None}
    settings["stage"] |= {"name": "dense", "train_vision_tower": False, "train_projector": True}
    built = stages.build(Recipe.model_validate(settings))
    base, family = built.model.base_model, families.family_of(built.model)
    projector = {id(p) for name in family.projectors for p in base.get_submodule(name).parameters()}
    tower = [p for p in base.get_submodule(family.tower).parameters() if id(p) not in projector]
    assert projector
    assert tower
    assert not any(p.requires_grad for p in tower)
    assert all(p.requires_grad for name in family.projectors for p in base.get_submodule(name).parameters())
    assert all(p.requires_grad for p in base.get_submodule(family.decoder).parameters())
