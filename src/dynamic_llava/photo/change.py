"""What training changed in ``photo-base``, stored small: the decoder's matrices in steps, the rest whole.

A change of rank 48 takes as many bytes and loses far more, see docs/decisions.md.

Legend: O, I outputs and inputs of a matrix.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import cast

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import LlavaForConditionalGeneration

from dynamic_llava.files import replacing

CODES, STEPS, WHOLE = "codes", "steps", "whole"
DECODER = "model.language_model.layers."
MOST = 127  # steps, either way

State = Mapping[str, Tensor]


def change_of(before: State, after: State, step: float) -> dict[str, Tensor]:
    """Return how a model's weights differ from those that it started from.

    Parameters
    ----------
    before, after
        Weights by module path.
    step
        What changes of the decoder's matrices are rounded to, as a multiple of the root mean square of the
        changes in a row. At 1 a weight takes 2.2 bits.

    Returns
    -------
    dict
        ``NAME.codes`` (uint8: the numbers of steps of all entries, compressed) and ``NAME.steps`` (float32
        [O]), or ``NAME.whole`` in half precision; what did not change is left out.

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
            found[f"{name}.{CODES}"], found[f"{name}.{STEPS}"] = _coded(change, step)
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
            if part == STEPS:
                continue
            if name not in weights:
                raise ValueError(f"the change is of another model: there is no {name}")
            added = decoded(change, name) if part == CODES else change[key].float()
            if added.shape != weights[name].shape:
                shapes = f"{tuple(weights[name].shape)}, not {tuple(added.shape)}"
                raise ValueError(f"the change is of another model: {name} is {shapes}")
            weights[name] += added.to(weights[name])


def decoded(change: State, name: str) -> Tensor:
    """Return the change of a matrix that is stored in steps, float32 [O, I].

    Raises
    ------
    ValueError
        If its codes are broken.
    """
    steps_O = change[f"{name}.{STEPS}"]
    try:
        data = zlib.decompress(change[f"{name}.{CODES}"].numpy().tobytes())
        codes_OI = torch.from_numpy(np.frombuffer(data, dtype=np.int8).reshape(len(steps_O), -1).copy())
    except (zlib.error, ValueError) as error:
        raise ValueError(f"the change of {name} is broken: install dynamic-llava-photo again") from error
    return codes_OI * steps_O[:, None]


def write_change(change: State, path: Path) -> None:
    """Write a change as a safetensors file."""
    with replacing(path) as partial:
        save_file(dict(change), partial)


def read_change(path: Path) -> dict[str, Tensor]:
    """Read what :func:`write_change` wrote."""
    return load_file(path)


def _coded(change_OI: Tensor, step: float) -> tuple[Tensor, Tensor]:
    """Return a matrix in steps: compressed codes, and the size of a step in each row."""
    least = torch.finfo(torch.float32).tiny  # a row that did not change may have any step but 0
    steps_O = (step * change_OI.square().mean(1).sqrt()).clamp(min=least)
    codes_OI = (change_OI / steps_O[:, None]).round().clamp(-MOST, MOST).to(torch.int8)
    # Neighbours say nothing of each other, so that runs are not looked for: frequent numbers get short codes.
    packer = zlib.compressobj(level=9, strategy=zlib.Z_HUFFMAN_ONLY)
    data = packer.compress(codes_OI.contiguous().numpy().tobytes()) + packer.flush()
    return torch.frombuffer(bytearray(data), dtype=torch.uint8), steps_O
