"""Converting between the official format and ours, one shard in memory at a time.

What has no counterpart on our side (the original config and tokenizer files, unused tensors) is kept in the
folder ``official/`` of the converted checkpoint, so that the way back gives the original, bit for bit.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from dynamic_llava.adapter import CONFIG_FILE, Adapter
from dynamic_llava.checkpoints.layout import from_hub, to_hub
from dynamic_llava.checkpoints.official import layout
from dynamic_llava.checkpoints.official.checkpoint import (
    VOCABULARY_ROWS,
    OfficialCheckpoint,
    expected_shapes,
)
from dynamic_llava.checkpoints.official.config import official_config, predictors_off, sparsity_config
from dynamic_llava.checkpoints.official.processor import picture_settings
from dynamic_llava.checkpoints.save import MARK, replacing_folder
from dynamic_llava.checkpoints.source import Source
from dynamic_llava.checkpoints.weights import Weights
from dynamic_llava.checkpoints.writing import SHARD_BYTES, ShardWriter
from dynamic_llava.files import read_object, write_json
from dynamic_llava.sparsifier import Sparsifier

Format = Literal["transformers", "official"]
KEPT = "official"  # folder of what has no counterpart
EXTRA = "extra.safetensors"
ORIGIN = "origin.json"
SMALL_FILES = (".json", ".model", ".txt", ".jinja")


@dataclass(frozen=True)
class Conversion:
    """What :func:`convert` wrote."""

    folder: Path
    format: Format
    tensors: int
    bytes: int
    shards: int
    has_sparsifier: bool


def convert(
    source: str | Path,
    out: str | Path,
    to: Format = "transformers",
    dtype: torch.dtype | None = None,
    vision_tower: str | Path | None = None,
    shard_bytes: int = SHARD_BYTES,
    progress: Callable[[int, int], None] = lambda done, total: None,
    force: bool = False,
) -> Conversion:
    """Write a checkpoint in the other format; every tensor is accounted for before the result gets its name.

    Parameters
    ----------
    source
        Folder or hub id.
    out
        Folder of the result. What an earlier conversion wrote there is replaced.
    to
        ``"transformers"`` (ours) from the official format, or ``"official"`` from ours.
    dtype
        Of the model's floating-point tensors; None keeps each tensor's own.
    vision_tower
        Where the tower of an official checkpoint lies, if not where its config says.
    shard_bytes
        Largest file of weights, and about what the conversion needs of memory.
    progress
        Called with the number of tensors written and of all.
    force
        Replace all that ``out`` holds, whoever wrote it, once the conversion has succeeded.

    Raises
    ------
    FileNotFoundError
        If a file is missing.
    ValueError
        If the source is in the target format already, or is broken, or ``out`` must not be replaced.
    """
    found = Source(source, vision_tower)
    if found.kind == "predictors":
        raise ValueError(f"{found.folder} holds predictors alone: convert the model that they belong to")
    if (found.kind == "official") == (to == "official"):
        raise ValueError(f"{found.folder} is in the {to} format already: nothing to convert")
    if Path(out).resolve() == found.folder.resolve():
        raise ValueError(f"{out} is the source itself: choose another folder")
    check = partial(_check_replaced, source=found.folder, force=force)
    with replacing_folder(Path(out), check) as folder:
        writer = ShardWriter(folder, shard_bytes)
        if to == "transformers":
            _to_transformers(found, dtype, writer, progress)
        else:
            _to_official(found, dtype, writer, progress)
        writer.close()
        write_json(folder / MARK, {"format": to, "files": _listed(folder)})
    names = sum(map(len, writer.names))
    has_sparsifier = found.adapter is not None
    return Conversion(Path(out), to, names, writer.total_bytes, len(writer.names), has_sparsifier)


def _check_replaced(out: Path, source: Path, force: bool) -> None:
    """Refuse to replace what `convert` did not write, unless ``force``; never what is in use."""
    for used, what in (
        (source, "the source"),
        (Path.cwd(), "the current folder"),
        (Path.home(), "your home"),
    ):
        if used.resolve().is_relative_to(out):
            raise ValueError(f"{out} holds {what}: choose another folder")
    foreign = None if force else _foreign(out)
    if foreign is not None:
        raise ValueError(
            f"{out} holds {foreign}, which convert did not write: choose another folder, or pass --force to "
            "replace all of it"
        )


def _foreign(out: Path) -> str | None:
    """Return the first file in a folder that is not as `convert` wrote it; None if there is none."""
    if not out.exists():
        return None
    written = read_object(out / MARK).get("files") if (out / MARK).is_file() else {}
    known = written.items() if isinstance(written, dict) else ()
    return next((name for name, state in _listed(out).items() if (name, state) not in known), None)


def _listed(folder: Path) -> dict[str, list[int]]:
    """Return size and time of each file below a folder, but for the list of them itself."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.name != MARK and not (path.is_dir() and not path.is_symlink()):
            status = path.lstat()
            found[path.relative_to(folder).as_posix()] = [status.st_size, status.st_mtime_ns]
    return found


def _to_transformers(
    source: Source, dtype: torch.dtype | None, writer: ShardWriter, progress: Callable[[int, int], None]
) -> None:
    checkpoint = source.official
    found = None
    for done, (path, tensor) in enumerate(checkpoint.tensors(), start=1):
        found = found or (dtype or tensor.dtype)
        writer.add(to_hub(path), _cast(tensor, dtype))
        progress(done, len(checkpoint.model_paths))
    checkpoint.config.architectures = ["LlavaForConditionalGeneration"]
    checkpoint.config.dtype = found
    checkpoint.config.save_pretrained(writer.folder)
    checkpoint.generation_config().save_pretrained(writer.folder)
    (checkpoint.processor or checkpoint.image_processor).save_pretrained(writer.folder)
    if checkpoint.adapter is not None:
        checkpoint.adapter.save(writer.folder)
    _keep_aside(checkpoint, writer.folder / KEPT)


def _keep_aside(checkpoint: OfficialCheckpoint, kept: Path) -> None:
    kept.mkdir()
    for path in checkpoint.folder.iterdir():
        if path.suffix in SMALL_FILES and path.is_file() and not path.name.endswith(".index.json"):
            shutil.copyfile(path, kept / path.name)
    write_json(kept / ORIGIN, {"has_vision_tower": checkpoint.tower is None})
    if aside := checkpoint.aside():
        save_file(
            {name: t.contiguous() for name, t in aside.items()}, kept / EXTRA, metadata={"format": "pt"}
        )


def _to_official(
    source: Source, dtype: torch.dtype | None, writer: ShardWriter, progress: Callable[[int, int], None]
) -> None:
    folder, config, weights, adapter = source.folder, source.config, source.weights, source.adapter
    origins = {from_hub(name): name for name in weights}
    shapes = _complete_shapes(folder, config, origins, weights)
    if adapter is not None:
        Sparsifier.from_adapter(adapter, folder)  # refuses a tensor that is missing, left over or misshapen
    kept = folder / KEPT
    if kept.is_dir():
        raw = json.loads((kept / "config.json").read_text(encoding="utf-8"))
        if sparsity_config(raw, str(kept)) != (adapter.config if adapter else None):
            raise ValueError(
                f"{folder / CONFIG_FILE} was changed since {kept} was kept: remove that folder to convert "
                "without it"
            )
        has_tower = json.loads((kept / ORIGIN).read_text(encoding="utf-8"))["has_vision_tower"]
        small = [file for file in kept.iterdir() if file.suffix in SMALL_FILES and file.name != ORIGIN]
    else:
        raw = official_config(config, adapter.config if adapter else None)
        pictures, raw["image_aspect_ratio"] = picture_settings(folder)
        has_tower = False
        small = [file for file in folder.iterdir() if file.suffix in SMALL_FILES and _is_general(file)]
        _write_tower(weights, origins, config, pictures, writer.folder / "vision_tower")
        write_json(writer.folder / "config.json", raw)
    for file in small:
        shutil.copyfile(file, writer.folder / file.name)
    total = len(origins)
    projector = raw.get("mm_projector_type", "linear")
    for done, (path, name) in enumerate(origins.items(), start=1):
        if has_tower or not path.startswith("model.vision_tower."):
            tensor = weights.read(name)
            if tensor.shape != shapes[path]:
                raise ValueError(
                    f"{weights.files[name]}: tensor {name} has shape {tuple(tensor.shape)}, expected "
                    f"{tuple(shapes[path])}"
                )
            rows = tensor[: raw["vocab_size"]] if path in VOCABULARY_ROWS else tensor
            writer.add(layout.to_official(path, projector), _cast(rows, dtype))
        progress(done, total)
    if adapter is not None:
        for name, tensor in _predictors(adapter):
            writer.add(name, tensor)
    if (kept / EXTRA).is_file():
        for name, tensor in load_file(kept / EXTRA).items():
            writer.add(name, tensor)


def _complete_shapes(folder: Path, config: Any, origins: dict[str, str], weights: Weights) -> dict[str, Any]:
    """Return the shape of each tensor by module path; refuse a checkpoint with others or fewer."""
    shapes = expected_shapes(config)
    for path in sorted(shapes.keys() - origins.keys()):
        if path != "lm_head.weight" or not config.tie_word_embeddings:
            raise ValueError(f"{folder}: tensor {to_hub(path)} is missing")
    for path in sorted(origins.keys() - shapes.keys()):
        name = origins[path]
        raise ValueError(
            f"{weights.files[name]}: tensor {name} has no place in the model that config.json describes"
        )
    return shapes


def _predictors(adapter: Adapter) -> Iterator[tuple[str, Tensor]]:
    """Predictors' tensors by their official names, without those that the config switches off."""
    off = predictors_off(adapter.config)
    for name, tensor in adapter.state.items():
        if name.split(".")[0] not in off:
            yield layout.to_official(f"sparsifier.{name}", ""), tensor


def _write_tower(
    weights: Weights, origins: dict[str, str], config: Any, pictures: dict[str, Any], folder: Path
) -> None:
    folder.mkdir()
    prefix = "model.vision_tower."
    tower = {
        "vision_model." + path.removeprefix(prefix): weights.read(name)
        for path, name in origins.items()
        if path.startswith(prefix)
    }
    save_file(tower, folder / "model.safetensors", metadata={"format": "pt"})
    config.vision_config.architectures = ["CLIPVisionModel"]
    config.vision_config.save_pretrained(folder)
    write_json(folder / "preprocessor_config.json", pictures | {"image_processor_type": "CLIPImageProcessor"})


def _is_general(path: Path) -> bool:
    return path.name not in ("config.json", CONFIG_FILE) and not path.name.endswith(".index.json")


def _cast(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    return tensor.to(dtype) if dtype is not None and tensor.is_floating_point() else tensor
