"""What the package of photo's weights holds, and that the model comes back from it."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from evidence.photo import store
from safetensors.torch import load_file

import dynamic_llava
from dynamic_llava import Sparsifier
from dynamic_llava.photo import trained as photo_trained
from dynamic_llava.training import nano
from evidence import tiny


@pytest.fixture
def base() -> Any:
    return tiny.model()


@pytest.fixture
def trained(base: Any, tmp_path: Path) -> tuple[Any, Path]:
    """The base with other matrices, its predictors, and its folder."""
    model, draw = copy.deepcopy(base), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.startswith("model.language_model.layers."):
                weight += 0.01 * torch.randn(weight.shape, generator=draw)
    tiny.sparsifier().attach(model)
    model.sparsifier.base_model = str(tmp_path / "somewhere")
    folder = tmp_path / "runs" / "model"
    model.save_pretrained(folder)
    model.sparsifier.save_pretrained(folder)
    return model, folder


def test_photo_loads_what_was_stored(
    base: Any, trained: tuple[Any, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, source = trained
    package = tmp_path / "installed" / "dynamic_llava_photo"
    stored = store.store(base, model, source, package, step=0.05)
    assert stored.kept == pytest.approx(1.0, abs=1e-3)
    assert stored.size == sum(path.stat().st_size for path in package.iterdir())
    base.save_pretrained(tmp_path / "base")
    nano.build_processor(scene_count=20).save_pretrained(tmp_path / "base")
    monkeypatch.syspath_prepend(package.parent)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(photo_trained, "base_folder", lambda: tmp_path / "base")
    loaded, _ = dynamic_llava.load("photo")
    assert isinstance(loaded.sparsifier, Sparsifier)
    with torch.inference_mode():
        expected, found = (each(**tiny.row(6)).logits for each in (model, loaded))
    torch.testing.assert_close(found, expected, atol=2e-2, rtol=0)
    assert torch.equal(model.sparsifier.report.image_kept[0], loaded.sparsifier.report.image_kept[0])


def test_predictors_are_stored_in_half_precision_and_name_no_folder(
    base: Any, trained: tuple[Any, Path], tmp_path: Path
) -> None:
    model, source = trained
    store.store(base, model, source, tmp_path / "package", step=1.0)
    state = load_file(tmp_path / "package" / "sparsifier.safetensors")
    assert {tensor.dtype for tensor in state.values()} == {torch.float16}
    for path in (tmp_path / "package").iterdir():
        assert str(tmp_path).encode() not in path.read_bytes()


def test_rounding_keeps_a_part_and_the_card_says_so(
    base: Any, trained: tuple[Any, Path], tmp_path: Path
) -> None:
    model, source = trained
    result = {
        "task": "flickr8k",
        "questions": 1000,
        "numbers": {"bleu_4": 12.34, "cider": 56.78, "image_tokens_kept": 0.2},
    }
    stored = store.store(base, model, source, tmp_path / "package", step=1.0, metrics=[result])
    assert 0.85 < stored.kept < 0.95  # a step of 1 loses 1 / 12 where changes are even
    card = (tmp_path / "package" / "README.md").read_text(encoding="utf-8")
    assert (
        f"rounded to 1 times its root mean square in each row, which keeps {100 * stored.kept:.1f} %" in card
    )
    assert "| flickr8k | 1,000 | 20% | CIDEr | 56.8 |" in card
    assert "research use only" in card.lower()
    assert not any(f"{{{name}}}" in card for name in ("step", "kept", "predictors", "metrics", "recipe"))


def test_a_dense_model_has_no_predictors(base: Any, tmp_path: Path) -> None:
    base.save_pretrained(tmp_path / "dense")
    store.store(base, base, tmp_path / "dense", tmp_path / "package", step=1.0)
    assert {path.name for path in (tmp_path / "package").iterdir()} == {"change.safetensors", "README.md"}
    card = (tmp_path / "package" / "README.md").read_text(encoding="utf-8")
    assert "no predictors: it answers dense" in card
    assert store.NONE in card


def test_what_is_no_result_of_evaluate_is_refused_before_a_model_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "kept.json").write_text('{"results": {}}')
    arguments = ["store", "none", str(tmp_path / "package"), "--metrics", str(tmp_path / "kept.json")]
    monkeypatch.setattr("sys.argv", arguments)
    with pytest.raises(SystemExit) as exited:
        store.main()
    assert exited.value.code == 2
    assert "kept.json: is no result of dynamic-llava evaluate; leave it out" in capsys.readouterr().err


def test_the_folder_of_the_package_is_the_one_that_is_looked_for() -> None:
    project = Path(store.__file__).parents[2] / "packages" / "photo"
    assert (project / photo_trained.PACKAGE / "__init__.py").is_file()
    assert f'"{photo_trained.PACKAGE}/{photo_trained.CHANGE}" = ' in (project / "pyproject.toml").read_text()
