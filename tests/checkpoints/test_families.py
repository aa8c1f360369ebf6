"""Models of every family load from a folder, with their predictors, and answer as before."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tests.families.models import CASES, HIDDEN

import dynamic_llava
from dynamic_llava import Sparsifier, SparsityConfig
from dynamic_llava.checkpoints import save

SIZES = {"d_model": 16, "nhead": 2, "dim_feedforward": 32}


@pytest.mark.parametrize("name", CASES)
def test_a_folder_loads_as_the_model_that_it_holds(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    model = case.model()
    row = case.row(5, 2 if case.picture else 0)
    Sparsifier(SparsityConfig(layer=2, **SIZES), HIDDEN).eval().attach(model)  # type: ignore[arg-type]
    save(model, None, tmp_path / "model")
    again, processor = dynamic_llava.load(tmp_path / "model")
    assert type(again) is type(model)
    assert processor is None
    with torch.no_grad():
        expected, found = model(**row).logits, again(**row).logits
    assert torch.equal(expected, found)
    assert again.sparsifier.report.kv_lengths.tolist() == model.sparsifier.report.kv_lengths.tolist()
