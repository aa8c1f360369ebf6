"""``photo``: the base with what training changed, built once from the package ``dynamic-llava-photo``."""

from __future__ import annotations

import hashlib
import shutil
from importlib.util import find_spec
from pathlib import Path

from transformers import LlavaForConditionalGeneration, LlavaProcessor

from dynamic_llava.photo import language, tower
from dynamic_llava.photo.base import base_folder, built, cache
from dynamic_llava.photo.change import apply_change, read_change
from dynamic_llava.photo.packages import TRAINED, file_of

PACKAGE, CHANGE = "dynamic_llava_photo", "change.safetensors"
BESIDE = ("README.md", "sparsifier.safetensors", "sparsifier_config.json")
"""What else a checkpoint has of the package: its card, and the predictors where there are any."""
READERS = ("gguf", "onnx")
"""Packages that the parts are read with."""


def trained_folder() -> Path:
    """Return the folder of ``photo`` in the user's cache, built there the first time (a minute, 620 MB).

    Raises
    ------
    ImportError
        If ``dynamic-llava-photo`` or a package of its parts is missing.
    ValueError
        If one of them holds something else than is expected.
    """
    change = file_of(PACKAGE, CHANGE, TRAINED)
    digest = hashlib.sha256(change.read_bytes()).hexdigest()[:12]
    return built(cache() / f"photo-{digest}", lambda partial: _write(partial, change))


def is_installed() -> bool:
    """Return whether everything is installed that ``photo`` is built from."""
    try:
        file_of(PACKAGE, CHANGE, TRAINED)
        tower.tower_file()
        language.language_file()
    except ImportError:
        return False
    return all(find_spec(reader) for reader in READERS)


def _write(partial: Path, change: Path) -> None:
    base = base_folder()
    model = LlavaForConditionalGeneration.from_pretrained(base)
    apply_change(model, read_change(change))
    model.save_pretrained(partial)
    LlavaProcessor.from_pretrained(base).save_pretrained(partial)
    for name in BESIDE:
        if (change.parent / name).is_file():
            shutil.copyfile(change.parent / name, partial / name)
