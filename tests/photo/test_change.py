"""A stored change gives the trained weights back, as far as its rank reaches."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dynamic_llava.photo.change import apply_change, change_of, read_change, write_change
from evidence import tiny

MATRIX = "model.language_model.layers.1.mlp.up_proj.weight"
NORM = "model.language_model.layers.0.input_layernorm.weight"
PROJECTOR = "model.multi_modal_projector.linear_1.weight"


def weights(model: Any) -> dict[str, Tensor]:
    return {name: weight.detach() for name, weight in model.named_parameters()}


@pytest.fixture
def trained() -> tuple[Any, Any]:
    """A model, and a copy: a matrix has moved by a change of rank 2, a norm and the projector by any."""
    before = tiny.model()
    after = copy.deepcopy(before)
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        moved = weights(after)
        rows, columns = moved[MATRIX].shape
        moved[MATRIX] += torch.randn(rows, 2, generator=draw) @ torch.randn(2, columns, generator=draw) * 0.01
        for name in (NORM, PROJECTOR):
            moved[name] += torch.randn(moved[name].shape, generator=draw) * 0.01
    return before, after


def test_a_change_of_the_stored_rank_comes_back(trained: tuple[Any, Any], tmp_path: Path) -> None:
    before, after = trained
    write_change(change_of(weights(before), weights(after), rank=2), tmp_path / "change.safetensors")
    change = read_change(tmp_path / "change.safetensors")
    assert change.keys() == {f"{MATRIX}.left", f"{MATRIX}.right", f"{NORM}.whole", f"{PROJECTOR}.whole"}
    assert {tensor.dtype for tensor in change.values()} == {torch.float16}
    apply_change(before, change)
    for name, weight in weights(after).items():
        torch.testing.assert_close(weights(before)[name], weight, atol=2e-4, rtol=0, msg=name)


def test_a_lower_rank_gives_the_nearest_matrix(trained: tuple[Any, Any]) -> None:
    before, after = trained
    old, new = weights(before)[MATRIX].clone(), weights(after)[MATRIX]
    apply_change(before, change_of(weights(before), weights(after), rank=1))
    lost = (weights(before)[MATRIX] - new).norm()
    assert lost == pytest.approx(torch.linalg.svdvals(new - old)[1].item(), rel=1e-2)


def test_a_change_of_another_model_is_refused(trained: tuple[Any, Any]) -> None:
    before, after = trained
    with pytest.raises(ValueError, match=r"of another model: there is no model\.other"):
        apply_change(before, {"model.other.weight.whole": torch.ones(1)})
    some = weights(after)
    some.pop(NORM)
    with pytest.raises(ValueError, match=f"{NORM} and 0 other weights"):
        change_of(weights(before), some, rank=1)
