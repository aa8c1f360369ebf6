"""Arrays of kind g: pictures padded or cropped to a square, as the official preprocessing describes it."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
SIZES = ((40, 75), (90, 33), (50, 50))  # height, width


def preprocessor_config(size: int) -> dict[str, Any]:
    """Return what the vision tower's folder says of its pictures."""
    return {
        "image_processor_type": "CLIPImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": size},
        "resample": 3,
        "do_center_crop": True,
        "crop_size": {"height": size, "width": size},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(MEAN),
        "image_std": list(STD),
    }


def pictures(size: int, seed: int) -> dict[str, Tensor]:
    """Return all arrays of the file."""
    generator = np.random.default_rng([seed, 20])
    arrays = {}
    for j, (height, width) in enumerate(SIZES):
        raw = generator.integers(0, 256, (height, width, 3), dtype=np.uint8)
        arrays[f"raw{j}"] = torch.from_numpy(raw)
        arrays[f"pad{j}"] = _pixels(_padded(Image.fromarray(raw)), size)
        arrays[f"square{j}"] = _pixels(Image.fromarray(raw), size)
    return arrays


def _padded(picture: Image.Image) -> Image.Image:
    """Put a picture in the middle of a square of the mean colour."""
    side = max(picture.size)
    square = Image.new("RGB", (side, side), tuple(int(255 * channel) for channel in MEAN))
    square.paste(picture, ((side - picture.width) // 2, (side - picture.height) // 2))
    return square


def _pixels(picture: Image.Image, size: int) -> Tensor:
    """Scale the shorter side to ``size``, crop the middle, normalise: ``[1, 3, S, S]``."""
    scale = size / min(picture.size)
    picture = picture.resize([int(side * scale) for side in picture.size], Image.Resampling.BICUBIC)
    left, top = ((side - size) // 2 for side in picture.size)
    values = np.asarray(picture.crop((left, top, left + size, top + size)), dtype=np.float64) / 255
    normal = (values - MEAN) / STD
    return torch.from_numpy(normal.transpose(2, 0, 1)[None].astype(np.float32))
