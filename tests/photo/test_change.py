"""A stored change gives the trained weights back, as far as its rank reaches."""

from __future__ import annotations

import copy
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import dynamic_llava
from dynamic_llava.photo import trained as photo_trained
from dynamic_llava.photo.change import apply_change, change_of, read_change, write_change
from dynamic_llava.training import nano
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


def test_photo_is_the_base_with_its_change(
    trained: tuple[Any, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, after = trained
    base, package = tmp_path / "base", tmp_path / "dynamic_llava_photo"
    before.save_pretrained(base)
    nano.build_processor(scene_count=20).save_pretrained(base)
    package.mkdir()
    (package / "README.md").write_text("card")
    write_change(change_of(weights(before), weights(after), rank=2), package / "change.safetensors")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(photo_trained, "base_folder", lambda: base)
    model, processor = dynamic_llava.load("photo")
    assert processor is not None
    for name, weight in weights(after).items():
        torch.testing.assert_close(weights(model)[name], weight, atol=2e-4, rtol=0, msg=name)
    assert (photo_trained.trained_folder() / "README.md").read_text() == "card"


def test_photo_without_its_package_says_what_to_install() -> None:
    if find_spec("dynamic_llava_photo"):
        pytest.skip("dynamic-llava-photo is installed")
    with pytest.raises(ImportError, match=r"change\.safetensors of .*: pip install dynamic-llava-photo"):
        dynamic_llava.load("photo")
