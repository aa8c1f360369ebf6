"""The frozen tower's output on every training picture, and on its mirror image: computed once, kept on disk.

Legend: K pictures, I patches, C channels; 1+I counts the class token.
"""

from __future__ import annotations

import hashlib
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from PIL import ImageOps
from torch import Tensor, nn
from transformers import LlavaForConditionalGeneration, LlavaProcessor
from transformers.modeling_outputs import BaseModelOutputWithPooling

from dynamic_llava.chat.images import open_image
from dynamic_llava.files import write_json

BATCH = 16
VIEWS = 2  # as it is, and mirrored
DONE = "done.json"  # written last
Look = Callable[[Sequence[Path], Sequence[bool], int], Tensor]
"""Takes pictures, whether each is mirrored, and a number of patches; returns what the tower says of them."""


class Features:
    """Tower outputs in half precision, read from the disk as they are asked for.

    Parameters
    ----------
    folder
        Where they are kept; one file for each list of pictures and each tower.
    lists
        The pictures.
    model, processor
        Whose tower looks at them, where that has not been done yet.
    """

    def __init__(
        self,
        folder: Path,
        lists: Sequence[Sequence[Path]],
        model: LlavaForConditionalGeneration,
        processor: LlavaProcessor,
    ) -> None:
        tower = released(model)
        self._rows: dict[Path, Any] = {}
        for paths in lists:
            self._rows.update(zip(paths, _kept(folder, paths, tower, processor), strict=True))

    def __call__(self, paths: Sequence[Path], mirrored: Sequence[bool], tokens: int) -> Tensor:
        """Return the outputs for some pictures, float32 [K, 1+I, C], pooled to ``tokens`` patches."""
        rows = [self._rows[path][int(flag)] for path, flag in zip(paths, mirrored, strict=True)]
        return pooled(torch.from_numpy(np.stack(rows)).float(), tokens)


class Blank:
    """Stands for `Features` where the model has no weights to look with: zeros of the right shape."""

    def __init__(
        self,
        folder: Path,
        lists: Sequence[Sequence[Path]],
        model: LlavaForConditionalGeneration,
        processor: LlavaProcessor,
    ) -> None:
        self.channels: int = cast(Any, model.config).vision_config.hidden_size

    def __call__(self, paths: Sequence[Path], mirrored: Sequence[bool], tokens: int) -> Tensor:
        """Return zeros, [K, 1+I, C]."""
        return torch.zeros(len(paths), 1 + tokens, self.channels)


def pooled(features_KIC: Tensor, tokens: int) -> Tensor:
    """Average neighbouring patches until ``tokens`` are left, a square number; keeps the class token."""
    class_K1C, patches_KIC = features_KIC[:, :1], features_KIC[:, 1:]
    side, smaller = math.isqrt(patches_KIC.shape[1]), math.isqrt(tokens)
    if side == smaller:
        return features_KIC
    grid = patches_KIC.transpose(1, 2).unflatten(2, (side, side))
    grid = nn.functional.avg_pool2d(grid, side // smaller)
    return torch.cat([class_K1C, grid.flatten(2).transpose(1, 2)], dim=1)


class GivenTower(nn.Module):
    """Stands where the tower stood and takes its output for pixel values.

    Parameters
    ----------
    tower
        The real one, which comes back when the model is saved.
    """

    def __init__(self, tower: nn.Module) -> None:
        super().__init__()
        self._real = [tower]  # in a list, it is no submodule

    @property
    def real(self) -> nn.Module:
        """The tower that this stands for."""
        return self._real[0]

    def forward(self, pixel_values: Tensor, **_: Any) -> BaseModelOutputWithPooling:
        """Return ``pixel_values`` as the last hidden state."""
        given = cast(Any, pixel_values)
        return BaseModelOutputWithPooling(last_hidden_state=given, hidden_states=(given,))


def give_features(model: LlavaForConditionalGeneration) -> None:
    """Let the model take tower outputs in the place of pixel values."""
    model.model.vision_tower = GivenTower(model.model.vision_tower)


def release_tower(model: LlavaForConditionalGeneration) -> None:
    """Put the real tower back, if it was taken away."""
    model.model.vision_tower = released(model)


def released(model: LlavaForConditionalGeneration) -> nn.Module:
    """Return the real tower of a model."""
    tower = cast(nn.Module, model.model.vision_tower)
    return tower.real if isinstance(tower, GivenTower) else tower


def _kept(folder: Path, paths: Sequence[Path], tower: nn.Module, processor: LlavaProcessor) -> Any:
    """Return the outputs for a list of pictures, [K, 2, 1+I, C], from the disk; computed where need be."""
    name = _digest(paths, tower)
    shape = (len(paths), VIEWS, *_shape(tower, processor))
    file, done = folder / f"{name}.f16", folder / f"{name}.{DONE}"
    if not done.is_file():
        _compute(file, done, paths, shape, tower, processor)
    return np.memmap(file, dtype=np.float16, mode="r", shape=shape)


def _shape(tower: nn.Module, processor: LlavaProcessor) -> torch.Size:
    """Return how many tokens the tower makes of one picture, and their channels."""
    side = processor.image_processor.size["height"]
    with torch.inference_mode():
        return _look(tower, torch.zeros(1, 3, side, side)).shape[1:]


def _look(tower: nn.Module, pixels: Tensor) -> Tensor:
    return cast(Tensor, tower(pixels, output_hidden_states=True).hidden_states[-1])


def _digest(paths: Sequence[Path], tower: nn.Module) -> str:
    """Return a name for the outputs of this tower on these pictures."""
    digest = hashlib.sha256("\n".join(path.name for path in paths).encode())
    for parameter in tower.parameters():
        digest.update(parameter.detach().float().numpy().tobytes())  # a sum depends on the number of threads
    return digest.hexdigest()[:16]


def _compute(
    file: Path,
    done: Path,
    paths: Sequence[Path],
    shape: tuple[int, ...],
    tower: nn.Module,
    processor: LlavaProcessor,
) -> None:
    """Let the tower look at every picture; ``done`` is written when ``file`` is whole."""
    file.parent.mkdir(parents=True, exist_ok=True)
    rows: Any = np.memmap(file, dtype=np.float16, mode="w+", shape=shape)
    for number, outputs in enumerate(_outputs(paths, tower, processor)):
        start = number * BATCH
        rows[start : start + len(outputs)] = outputs.half().numpy()
        if number % 20 == 0:
            print(f"tower: {start:,} of {len(paths):,} pictures", file=sys.stderr)
    rows.flush()
    write_json(done, {"pictures": len(paths)})


def _outputs(paths: Sequence[Path], tower: nn.Module, processor: LlavaProcessor) -> Iterator[Tensor]:
    for start in range(0, len(paths), BATCH):
        images = [open_image(path) for path in paths[start : start + BATCH]]
        views = images + [ImageOps.mirror(image) for image in images]
        pixels = processor.image_processor(views, return_tensors="pt")["pixel_values"]
        with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
            outputs = _look(tower, pixels).float()
        yield outputs.unflatten(0, (VIEWS, len(images))).transpose(0, 1)
