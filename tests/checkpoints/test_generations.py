"""Two generations of weights in one folder: the one that transformers takes counts, and a warning says so."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests import tiny
from tests.checkpoints import official_files
from torch import Tensor
from transformers import LlavaForConditionalGeneration

from dynamic_llava import checkpoints

SINGLE, SHARDS = "model.safetensors", "model.safetensors.index.json"
PICKLE, PICKLES = "pytorch_model.bin", "pytorch_model.bin.index.json"
PRECEDENCE = (SINGLE, SHARDS, PICKLE, PICKLES)  # as transformers resolves a folder
PAIRS = list(itertools.combinations(PRECEDENCE, 2))
HEAD = "language_model.lm_head.weight"


def write(folder: Path, kind: str, tensors: dict[str, Tensor]) -> list[str]:
    """Write a generation of weights; return the names of its files."""
    if not kind.endswith(".index.json"):
        parts, files = [tensors], [kind]
    else:
        names = sorted(tensors)
        parts = [{name: tensors[name] for name in names[i::2]} for i in range(2)]
        stem, suffix = kind.removesuffix(".index.json").split(".")
        files = [f"{stem}-{i + 1:05d}-of-00002.{suffix}" for i in range(2)]
        places = {name: file for file, part in zip(files, parts, strict=True) for name in part}
        (folder / kind).write_text(json.dumps({"metadata": {}, "weight_map": places}))
    for file, part in zip(files, parts, strict=True):
        if file.endswith(".bin"):
            torch.save(part, folder / file)
        else:
            save_file(part, folder / file, metadata={"format": "pt"})
    return sorted({*files, kind})


def two_generations(folder: Path, name: str, kinds: tuple[str, str]) -> list[str]:
    """Put two generations in the place of one; ``name`` starts with 222 in the first and 111 in the other.

    Returns the files of the other.
    """
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    for kind, value in zip(kinds, (222, 111), strict=True):
        changed = tensors[name].clone()
        changed.view(-1)[0] = value
        files = write(folder, kind, {**tensors, name: changed})
    return files


def first(tensor: Tensor) -> float:
    return float(tensor.detach().view(-1)[0])


@pytest.fixture
def stock(tmp_path: Path) -> Path:
    checkpoints.save(tiny.model(), None, tmp_path / "stock")
    return tmp_path / "stock"


@pytest.mark.parametrize("kinds", PAIRS)
def test_models_of_transformers(kinds: tuple[str, str], stock: Path) -> None:
    ignored = two_generations(stock, HEAD, kinds)
    assert first(LlavaForConditionalGeneration.from_pretrained(stock).lm_head.weight) == 222
    with pytest.warns(UserWarning, match=f"{kinds[0]}.*ignored") as caught:
        model: Any = checkpoints.load_model(stock)
    assert first(model.lm_head.weight) == 222
    (message,) = [str(warning.message) for warning in caught]
    assert str(stock) in message
    assert "\n" not in message
    assert [name for name in ignored if name not in message] == []
    with pytest.warns(UserWarning, match="ignored"):
        checkpoints.convert(stock, stock.parent / "official", to="official")
    assert first(load_file(stock.parent / "official" / SINGLE)["lm_head.weight"]) == 222


@pytest.mark.parametrize("kinds", PAIRS)
def test_official_models(kinds: tuple[str, str], tmp_path: Path) -> None:
    folder = official_files.write(tmp_path)
    two_generations(folder, "lm_head.weight", kinds)
    with pytest.warns(UserWarning, match=f"{kinds[0]}.*ignored"):
        model: Any = checkpoints.load_model(folder)
    assert first(model.lm_head.weight) == 222
    with pytest.warns(UserWarning, match="ignored"):
        checkpoints.convert(folder, tmp_path / "ours")
    assert first(load_file(tmp_path / "ours" / SINGLE)[HEAD]) == 222


@pytest.mark.parametrize("kinds", PAIRS)
def test_towers(kinds: tuple[str, str], tmp_path: Path) -> None:
    folder = official_files.write(tmp_path)
    two_generations(tmp_path / "vision_tower", "vision_model.pre_layrnorm.bias", kinds)
    with pytest.warns(UserWarning, match=f"vision_tower.*{kinds[0]}.*ignored"):
        model: Any = checkpoints.load_model(folder)
    assert first(model.model.vision_tower.pre_layrnorm.bias) == 222


def test_shards_of_another_count_are_ignored_too(stock: Path) -> None:
    """Saved anew in fewer shards: what is left of the old ones is named by no index."""
    tensors = load_file(stock / SINGLE)
    (stock / SINGLE).unlink()
    write(stock, SHARDS, tensors)
    save_file(tensors, stock / "model-00003-of-00003.safetensors")
    with pytest.warns(UserWarning, match=r"ignored: model-00003-of-00003\.safetensors"):
        checkpoints.load_model(stock)


def test_many_ignored_files_make_one_short_line(stock: Path) -> None:
    for i in range(9):
        torch.save({}, stock / f"pytorch_model-{i + 1:05d}-of-00009.bin")
    with pytest.warns(UserWarning, match=r"ignored: pytorch_model-00001-of-00009\.bin, .* and 6 more"):
        checkpoints.load_model(stock)


def test_a_file_that_the_config_names_comes_first(stock: Path) -> None:
    """Transformers reads it before the others."""
    tensors = load_file(stock / SINGLE)
    tensors[HEAD] = tensors[HEAD].clone()
    tensors[HEAD][0, 0] = 333
    save_file(tensors, stock / "other.safetensors", metadata={"format": "pt"})
    config = json.loads((stock / "config.json").read_text()) | {"transformers_weights": "other.safetensors"}
    (stock / "config.json").write_text(json.dumps(config))
    assert first(LlavaForConditionalGeneration.from_pretrained(stock).lm_head.weight) == 333
    with pytest.warns(UserWarning, match=r"other\.safetensors.*ignored: model\.safetensors"):
        model: Any = checkpoints.load_model(stock)
    assert first(model.lm_head.weight) == 333
    with pytest.warns(UserWarning, match="ignored"):
        checkpoints.convert(stock, stock.parent / "official", to="official")
    assert first(load_file(stock.parent / "official" / SINGLE)["lm_head.weight"]) == 333
