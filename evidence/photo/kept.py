"""How much of what a method keeps lies on what captions name, on the 50 pictures that were marked by hand.

    python -m evidence.photo.kept photo ../shared/photos/flickr8k/images --output FILE

A patch lies on something if its middle is in a box of ``boxes.json``. The ratio is the mean share of kept
patches that do, over the mean share of all patches that do; its interval is a bootstrap over the pictures.
Evenly kept patches have a ratio of 1.

Legend: I patches.
"""

from __future__ import annotations

import argparse
import json
import math
import shlex
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dynamic_llava import load
from dynamic_llava.chat.asking import ask
from dynamic_llava.chat.images import open_image
from dynamic_llava.data.photographs import CAPTION_REQUESTS
from dynamic_llava.environment import environment
from dynamic_llava.files import check_file, write_json
from dynamic_llava.sparsifier import sparsifier_of

BOXES = Path(__file__).with_name("boxes.json")
POLICIES = ("learned", "uniform", "random", "fastv")
DRAWS = 10_000


def on_boxes(boxes: Sequence[dict[str, Any]], patches: int) -> Tensor:
    """Return which patches of a square grid have their middle in a box: bool [I]."""
    side = math.isqrt(patches)
    middle = (torch.arange(side) + 0.5) / side
    flags = torch.zeros(side, side, dtype=torch.bool)
    for box in boxes:
        left, top, right, bottom = box["box"]
        rows, columns = (middle >= top) & (middle < bottom), (middle >= left) & (middle < right)
        flags |= rows[:, None] & columns
    return flags.flatten()


def ratio(kept: Sequence[float], area: Sequence[float]) -> dict[str, Any]:
    """Return the ratio of two mean shares over pictures, with its 95 % bootstrap interval."""
    pairs = np.array([kept, area])
    picked = np.random.default_rng(0).integers(0, pairs.shape[1], (DRAWS, pairs.shape[1]))
    means = pairs[:, picked].mean(-1)
    low, high = np.quantile(means[0] / means[1], (0.025, 0.975))
    share, whole = pairs.mean(1)
    return {
        "kept_on_boxes": round(float(share), 4),
        "area_of_boxes": round(float(whole), 4),
        "ratio": round(float(share / whole), 4),
        "interval_95": [round(float(low), 4), round(float(high), 4)],
    }


def measure(model: Any, processor: Any, images: Path, rates: Sequence[float]) -> dict[str, Any]:
    """Return the ratio of each policy at each rate, and each picture's shares."""
    pictures = json.loads(BOXES.read_text(encoding="utf-8"))["pictures"]
    results: dict[str, Any] = {}
    config = model.sparsifier.config
    for policy in POLICIES:
        for rate in rates:
            model.sparsifier.config = replace(config, image_policy=policy, image_keep_rate=rate)
            shares = [_shares(model, processor, images, picture) for picture in pictures]
            results[f"{policy} {rate:g}"] = {
                **ratio(*zip(*shares, strict=True)),
                "pictures": {p["image"]: pair for p, pair in zip(pictures, shares, strict=True)},
            }
    model.sparsifier.config = config
    return results


def _shares(model: Any, processor: Any, images: Path, picture: dict[str, Any]) -> tuple[float, float]:
    """Return the share of kept patches, and of all, that lie on boxes."""
    reply = ask(model, processor, CAPTION_REQUESTS[0], [open_image(images / picture["image"])], 1)
    on_I = on_boxes(picture["boxes"], model.config.image_seq_length)
    kept = reply.report.image_kept[0].cpu() if reply.report is not None else torch.arange(len(on_I))
    return round(on_I[kept].float().mean().item(), 4), round(on_I.float().mean().item(), 4)


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("images", type=Path)
    parser.add_argument("--rates", type=float, nargs="+", default=[0.05, 0.1, 0.2, 0.5])
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    parser.add_argument("--output", type=Path, required=True)
    given = parser.parse_args()
    check_file("--output", given.output)
    model, processor = load(given.model, dtype=getattr(torch, given.dtype))
    if sparsifier_of(model) is None:
        parser.error(f"{given.model} has no sparsifier, so nothing is dropped; give a model with predictors")
    results = measure(model, processor, given.images, given.rates)
    command = shlex.join(["python", "-m", "evidence.photo.kept", *sys.argv[1:]])
    head = {"command": command, "model": given.model, "dtype": given.dtype}
    write_json(given.output, {**head, "results": results, **environment(model.device)})
    for name, result in results.items():
        print(f"{name}: ratio {result['ratio']}, interval {result['interval_95']}")


if __name__ == "__main__":
    main()
