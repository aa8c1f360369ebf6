"""The CLIP vision tower of an official checkpoint, which usually lies elsewhere.

The official code reads it from ``mm_vision_tower`` and ignores a copy inside the checkpoint, unless the tower
was trained along (``unfreeze_mm_vision_tower``). So does this module; where ``mm_vision_tower`` cannot be
reached, a copy inside the checkpoint serves.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import CLIPVisionConfig

from dynamic_llava import hub
from dynamic_llava.checkpoints.configs import made_from
from dynamic_llava.checkpoints.weights import Weights
from dynamic_llava.files import read_object
from dynamic_llava.hub import Access

# The two towers of the official models, so that a checkpoint with a copy of its own loads offline.
LARGE = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
KNOWN: dict[str, dict[str, Any]] = {
    "openai/clip-vit-large-patch14": LARGE | {"patch_size": 14, "image_size": 224, "projection_dim": 768},
    "openai/clip-vit-large-patch14-336": LARGE | {"patch_size": 14, "image_size": 336, "projection_dim": 768},
}
CONFIG_FILES = ["*.json"]
TOWER_FILES = [*CONFIG_FILES, "*.safetensors", "*.bin"]


class Tower:
    """A CLIP vision tower in a folder of its own.

    Parameters
    ----------
    folder
        Holds the config and the weights of a ``CLIPVisionModel`` or a whole ``CLIPModel``.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.config = _read_config(folder)

    @cached_property
    def weights(self) -> Weights:
        """Its tensors, by their names in the files."""
        return Weights(self.folder)

    @cached_property
    def names(self) -> dict[str, str]:
        """Name in the files of each module path here, ``model.vision_tower...``."""
        return {self._path(name): name for name in self.weights if self._belongs(name)}

    def read(self, path: str) -> Tensor:
        """Return a tensor by its module path here, ``model.vision_tower...``."""
        return self.weights.read(self.names[path])

    def file(self, path: str) -> Path:
        """Return the file of a tensor by its module path here."""
        return self.weights.files[self.names[path]]

    @staticmethod
    def _path(name: str) -> str:
        return "model.vision_tower." + name.removeprefix("vision_model.")

    @staticmethod
    def _belongs(name: str) -> bool:
        parts = ("text_model.", "logit_scale", "visual_projection.", "text_projection.")
        return not name.startswith(parts) and not name.endswith("position_ids")


def find_tower(
    config: dict[str, Any],
    folder: Path,
    given: str | Path | None,
    has_own: bool,
    files: Sequence[str],
    access: Access,
) -> Tower | None:
    """Return the tower to use, or None for the checkpoint's own copy.

    Raises
    ------
    FileNotFoundError
        If there is neither a reachable tower nor a copy.
    """
    if given is None and has_own and config.get("unfreeze_mm_vision_tower"):
        return None
    name = str(given or _named(config))
    if not name and not has_own:
        raise FileNotFoundError(f"{folder}: config.json names no mm_vision_tower; pass vision_tower=...")
    place = _place(name, None if given else folder, files, access)
    if place is not None:
        return Tower(place)
    if given is None and has_own:
        return None
    raise FileNotFoundError(
        f"the vision tower {name!r} of {folder} is neither a folder nor a hub model that could be fetched; "
        "pass vision_tower=FOLDER_OR_HUB_ID"
    )


def own_config(config: dict[str, Any], folder: Path, access: Access) -> CLIPVisionConfig:
    """Return the config of a copy inside the checkpoint: it lies with the tower that the copy stems from."""
    name = _named(config)
    if name in KNOWN:
        return CLIPVisionConfig(**KNOWN[name])
    place = _place(name, folder, CONFIG_FILES, access)
    if place is None:
        raise FileNotFoundError(
            f"{folder} holds its vision tower, but not the tower's config, and {name!r} cannot be reached; "
            "pass vision_tower=FOLDER_OR_HUB_ID"
        )
    return _read_config(place)


def _named(config: dict[str, Any]) -> str:
    return str(config.get("mm_vision_tower") or config.get("vision_tower") or "")


def _place(name: str, checkpoint: Path | None, files: Sequence[str], access: Access) -> Path | None:
    """Return the folder of a tower, relative to its checkpoint first, or fetched from the hub."""
    path = Path(name).expanduser()
    for place in (path,) if checkpoint is None else (checkpoint / path, path):
        if name and (place / "config.json").is_file():
            return place
    if not hub.is_id(name):
        return None
    try:
        return hub.fetch(name, files, "hub model", access.elsewhere())
    except FileNotFoundError:
        return None


def _read_config(folder: Path) -> CLIPVisionConfig:
    path = folder / "config.json"
    with made_from(path, "vision tower"):
        config = read_object(path)
        model_type = config["model_type"]
        made = CLIPVisionConfig(**config.get("vision_config", config))
    if model_type not in ("clip", "clip_vision_model"):
        raise ValueError(f"{path}: the vision tower is a {model_type}, only CLIP is supported")
    return made
