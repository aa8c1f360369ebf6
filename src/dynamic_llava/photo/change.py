"""What training changed in ``photo-base``, stored small: the decoder's matrices at low rank, the rest whole.

Legend: O, I outputs and inputs of a matrix, R rank.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import cast

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import LlavaForConditionalGeneration

from dynamic_llava.files import replacing

LEFT, RIGHT, WHOLE = "left", "right", "whole"
DECODER = "model.language_model.layers."

State = Mapping[str, Tensor]


def change_of(before: State, after: State, rank: int) -> dict[str, Tensor]:
    """Return how a model's weights differ from those that it started from, in half precision.

    Parameters
    ----------
    before, after
        Weights by module path.
    rank
        Of the change of each matrix of the decoder. What is stored is the nearest matrix of that rank, by the
        singular value decomposition.

    Returns
    -------
    dict
        ``NAME.left`` [O, R] and ``NAME.right`` [R, I], or ``NAME.whole``; what did not change is left out.

    Raises
    ------
    ValueError
        If the two hold other weights.
    """
    if wrong := before.keys() ^ after.keys():
        raise ValueError(f"{min(wrong)} and {len(wrong) - 1} other weights are in one model only")
    found: dict[str, Tensor] = {}
    for name, old in before.items():
        change = after[name].float() - old.float()
        if not change.any():
            continue
        if name.startswith(DECODER) and change.ndim == 2:
            found[f"{name}.{LEFT}"], found[f"{name}.{RIGHT}"] = _parts(change, rank)
        else:
            found[f"{name}.{WHOLE}"] = change.half()
    return found


def apply_change(model: LlavaForConditionalGeneration, change: State) -> None:
    """Add a stored change to a model's weights.

    Raises
    ------
    ValueError
        If it was taken from another model.
    """
    weights = cast(dict[str, Tensor], dict(model.named_parameters()))
    with torch.no_grad():
        for key in change:
            name, _, part = key.rpartition(".")
            if part == RIGHT:
                continue
            if name not in weights:
                raise ValueError(f"the change is of another model: there is no {name}")
            added = change[key].float()
            if part == LEFT:
                added = added @ change[f"{name}.{RIGHT}"].float()
            weights[name] += added.to(weights[name])


def write_change(change: State, path: Path) -> None:
    """Write a change as a safetensors file."""
    with replacing(path) as partial:
        save_file(dict(change), partial)


def read_change(path: Path) -> dict[str, Tensor]:
    """Read what :func:`write_change` wrote."""
    return load_file(path)


def _parts(change_OI: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return the factors of the nearest matrix of a rank; both carry the root of each singular value."""
    left_OK, values_K, right_KI = torch.linalg.svd(change_OI, full_matrices=False)
    roots_R = values_K[:rank].sqrt()
    left_OR, right_RI = left_OK[:, :rank] * roots_R, roots_R[:, None] * right_KI[:rank]
    return left_OR.half().contiguous(), right_RI.half().contiguous()
