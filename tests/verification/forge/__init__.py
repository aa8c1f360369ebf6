"""Writes folders like the official golden vectors, of any size, computed by an independent reference."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.torch import save_file
from tests.verification.forge.inference import dialogue, generation, prefill
from tests.verification.forge.model import Shape, configs, random_weights
from tests.verification.forge.pictures import pictures, preprocessor_config
from tests.verification.forge.reference import TOWER, Reference
from tests.verification.forge.training import training
from torch import Tensor

__all__ = ["Shape", "write"]


def write(folder: Path, shape: Shape) -> None:
    """Write a checkpoint in the official format, its vision tower, and a file of each kind a, c, e, f, g."""
    config, vision = configs(shape)
    weights = random_weights(shape, config, vision)
    model = Reference(weights, config, vision)
    _write_model(folder / "checkpoint", weights, config)
    prefix = f"model.{TOWER.removesuffix('vision_model.')}"
    tower = {name.removeprefix(prefix): w for name, w in weights.items() if name.startswith(prefix)}
    _write_model(folder / "vision_tower", tower, vision)
    preprocessor = json.dumps(preprocessor_config(shape.image_size))
    (folder / "vision_tower" / "preprocessor_config.json").write_text(preprocessor)
    files = {
        "a_prefill_b1": prefill(model, shape),
        "c_gen_cache_b1": generation(model, shape),
        "e_train": training(model, shape),
        "f_multiturn": dialogue(model, shape),
        "g_preprocess": pictures(shape.image_size, shape.seed),
    }
    for name, arrays in files.items():
        np.savez(folder / f"{name}.npz", **_shortened(arrays, shape))


def _write_model(folder: Path, weights: dict[str, Tensor], config: dict[str, Any]) -> None:
    folder.mkdir(parents=True)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))


def _shortened(arrays: dict[str, Any], shape: Shape) -> dict[str, np.ndarray]:
    """With a large vocabulary, the first 64 columns, argmax and logsumexp stand for logits."""
    shortened: dict[str, np.ndarray] = {}
    for key, value in arrays.items():
        if key.endswith("logits") and "pred" not in key and shape.vocabulary > 1000:
            shortened[f"{key}_first64"] = value[..., :64].detach().numpy()
            shortened[f"{key}_argmax"] = value.argmax(-1).detach().numpy()
            shortened[f"{key}_logsumexp"] = value.logsumexp(-1).detach().numpy()
        else:
            shortened[key] = value.detach().numpy() if isinstance(value, Tensor) else np.array(value)
    return shortened
