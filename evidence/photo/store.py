"""Writes what training changed in photo-base, small, as the package ``dynamic-llava-photo`` carries it.

    python -m evidence.photo.store runs/photo/dynamic/model FOLDER --rank 48

Prints how much of the decoder's change is kept (squared entries of its matrices), and the bytes written.
"""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from dynamic_llava import load_model
from dynamic_llava.chat.asking import dense
from dynamic_llava.photo.change import DECODER, LEFT, RIGHT, change_of, write_change
from dynamic_llava.photo.trained import BESIDE, CHANGE


def kept_share(
    before: Mapping[str, Tensor], after: Mapping[str, Tensor], change: Mapping[str, Tensor]
) -> float:
    """Return the share of the squared change of the decoder's matrices that low rank keeps."""
    whole = lost = 0.0
    for name in before:
        if name.startswith(DECODER) and f"{name}.{LEFT}" in change:
            moved = after[name] - before[name]
            stored = change[f"{name}.{LEFT}"].float() @ change[f"{name}.{RIGHT}"].float()
            whole += moved.square().sum().item()
            lost += (moved - stored).square().sum().item()
    return 1 - lost / whole if whole else 1.0


def weights(model: Any) -> dict[str, Tensor]:
    """Return a stock model's weights by module path."""
    with dense(model):
        return {name: weight.detach() for name, weight in model.named_parameters()}


def main() -> None:
    """Store a trained model's change."""
    parser = argparse.ArgumentParser()
    parser.add_argument("model", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--rank", type=int, default=48)
    given = parser.parse_args()
    before, after = weights(load_model("photo-base")), weights(load_model(given.model))
    change = change_of(before, after, given.rank)
    write_change(change, given.folder / CHANGE)
    for name in BESIDE[1:]:
        if (given.model / name).is_file():
            shutil.copyfile(given.model / name, given.folder / name)
    size = sum(path.stat().st_size for path in given.folder.iterdir() if path.is_file())
    print(f"kept {kept_share(before, after, change):.1%} of the change, {size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
