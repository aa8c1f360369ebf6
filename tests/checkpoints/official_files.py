"""Tiny checkpoints in the official format, written as the official code would, and ways to break them."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tests.verification.forge.model import Shape, configs, random_weights
from tests.verification.forge.reference import TOWER
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

SHAPE = Shape(hidden=32, layers=3, heads=4, key_heads=2, image_size=28, vocabulary=40)
OWN_TOWER = f"model.{TOWER}"


def write(root: Path, dtype: torch.dtype = torch.float32, question: bool = False, **changes: Any) -> Path:
    """Write and return ``root/checkpoint``, with its ``root/vision_tower``; ``changes`` go to its config."""
    shape = dataclasses.replace(SHAPE, question=question)
    config, vision = configs(shape)
    weights = {name: tensor.to(dtype) for name, tensor in random_weights(shape, config, vision).items()}
    tower = {
        name.removeprefix("model.vision_tower.vision_tower."): tensor
        for name, tensor in weights.items()
        if name.startswith(OWN_TOWER)
    }
    for folder, content, tensors in (
        (root / "checkpoint", config | changes, weights),
        (root / "vision_tower", vision, tower),
    ):
        folder.mkdir(parents=True)
        write_config(folder, content)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return root / "checkpoint"


def write_tokenizer(folder: Path, *special: str) -> None:
    """Write a tokenizer of forty words and these special tokens."""
    words = {word: i for i, word in enumerate(["<unk>", "<s>", "</s>", *(f"w{i}" for i in range(37))])}
    made = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=made, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<unk>"
    )
    tokenizer.add_special_tokens({"additional_special_tokens": list(special)})
    tokenizer.save_pretrained(folder)


def write_config(folder: Path, config: dict[str, Any]) -> None:
    (folder / "config.json").write_text(json.dumps(config, indent=2))


def config_of(folder: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return config


def change_config(folder: Path, **changes: Any) -> None:
    """Set fields of ``config.json``; None removes one."""
    config = {name: value for name, value in (config_of(folder) | changes).items() if value is not None}
    write_config(folder, config)


def tensors_of(folder: Path) -> dict[str, Tensor]:
    """All tensors of a folder of safetensors."""
    return {
        name: t for path in sorted(folder.glob("model*.safetensors")) for name, t in load_file(path).items()
    }


def change_tensors(folder: Path, **changes: Tensor | None) -> None:
    """Replace, add, or (None) remove tensors; in names ``__`` stands for a dot."""
    named = {name.replace("__", "."): tensor for name, tensor in changes.items()}
    tensors = {name: t for name, t in (tensors_of(folder) | named).items() if t is not None}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def without_predictors(folder: Path, **changes: Any) -> None:
    """Turn a checkpoint into one of the official LLaVA that Dynamic-LLaVA starts from."""
    tensors = {name: t for name, t in tensors_of(folder).items() if "_score_predictor" not in name}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    change_config(folder, sparse_config=None, model_type="llava_llama", **changes)


def shard(folder: Path, suffix: str, count: int = 3) -> None:
    """Spread ``model.safetensors`` over ``count`` shards with an index, as safetensors or ``.bin``."""
    tensors = tensors_of(folder)
    (folder / "model.safetensors").unlink()
    stem = "model" if suffix == "safetensors" else "pytorch_model"
    files = [f"{stem}-{i + 1:05d}-of-{count:05d}.{suffix}" for i in range(count)]
    places = {name: files[i % count] for i, name in enumerate(tensors)}
    for file in files:
        part = {name: tensors[name] for name, place in places.items() if place == file}
        if suffix == "safetensors":
            save_file(part, folder / file, metadata={"format": "pt"})
        else:
            torch.save(part, folder / file)
    (folder / f"{stem}.{suffix}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
