"""What users do by accident: failed calls, odd arguments, models of another kind."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tests import tiny

from dynamic_llava import Sparsifier, SparsityConfig, checkpoints
from dynamic_llava.checkpoints import save


def test_cache_of_a_failed_call_is_refused() -> None:
    model = tiny.model()
    tiny.sparsifier().attach(model)
    with torch.no_grad():
        cache = model(**tiny.row(4), use_cache=True).past_key_values

        def fail(*_: Any) -> None:
            raise RuntimeError("interrupted")

        handle = model.model.language_model.layers[3].register_forward_pre_hook(fail)
        token = torch.tensor([[7]])
        with pytest.raises(RuntimeError, match="interrupted"):
            model(input_ids=token, past_key_values=cache, use_cache=True)
        handle.remove()
        with pytest.raises(ValueError, match="an earlier call with this cache failed"):
            model(input_ids=token, past_key_values=cache, use_cache=True)
        cache.reset()
        model(**tiny.row(4), past_key_values=cache, use_cache=True)


def test_cache_of_a_beam_search_goes_on_outside_inference_mode() -> None:
    model = tiny.model()
    tiny.sparsifier().attach(model)
    with torch.inference_mode():
        cache = model(**tiny.row(4), use_cache=True).past_key_values
        cache.reorder_cache(torch.tensor([0]))
    with torch.no_grad():
        model(input_ids=torch.tensor([[7]]), past_key_values=cache, use_cache=True)


def test_pictures_that_span_rows_are_refused() -> None:
    model = tiny.model()
    tiny.sparsifier().attach(model)
    two = tiny.row(4, images=2)
    image = two["input_ids"][0] == tiny.IMAGE_TOKEN
    uneven = two["input_ids"].repeat(2, 1)
    uneven[0, image.nonzero()[:24, 0]] = 7  # 8 image tokens in the first row, 24 in the second
    uneven[1, image.nonzero()[:8, 0]] = 7
    with pytest.raises(ValueError, match="row"):
        model(input_ids=uneven, pixel_values=two["pixel_values"])


def test_positional_labels_need_an_answer_mask_too() -> None:
    model = tiny.model()
    tiny.sparsifier().attach(model)
    row = tiny.row(4)
    before_labels = [row["input_ids"], row["pixel_values"], row["attention_mask"], *[None] * 5]
    with pytest.raises(ValueError, match="answer_mask"):
        model(*before_labels, row["input_ids"])


@pytest.mark.parametrize("layer", [2.5, "2"])
def test_layer_must_be_whole(layer: Any) -> None:
    with pytest.raises(ValueError, match="layer is"):
        SparsityConfig(layer=layer)


def test_saving_that_fails_at_the_end_leaves_the_old_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "model"
    checkpoints.save(tiny.model(seed=0), None, folder)
    before = load_file(folder / "model.safetensors")
    rename = Path.rename

    def fail(self: Path, target: Path) -> Path:
        if self.name.endswith(".partial"):
            raise OSError("disk full")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(OSError, match="disk full"):
        checkpoints.save(tiny.model(seed=1), None, folder)
    after = load_file(folder / "model.safetensors")
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("training", [True, False])
def test_attaching_takes_over_the_mode_of_the_model(training: bool) -> None:
    model, sparsifier = tiny.model().train(training), tiny.sparsifier().train(not training)
    sparsifier.attach(model)
    assert sparsifier.training == training


def test_training_without_answer_mask_is_refused() -> None:
    model = tiny.model()
    tiny.sparsifier().attach(model)
    model.train()
    with pytest.raises(ValueError, match="answer_mask"):
        model(**tiny.row(4))
    with torch.no_grad():
        model(**tiny.row(4))


def test_attention_dropout_is_refused_in_training() -> None:
    model = tiny.model()
    tiny.sparsifier().attach(model)
    model.train()
    for layer in model.model.language_model.layers:
        layer.self_attn.attention_dropout = 0.1
    row = tiny.row(4)
    with pytest.raises(ValueError, match="attention_dropout"):
        model(**row, answer_mask=torch.zeros_like(row["input_ids"], dtype=torch.bool))


@pytest.mark.parametrize("stranger", ["thesis.pdf", "checkpoint-100"])
def test_saving_never_replaces_a_folder_with_something_else_in_it(tmp_path: Path, stranger: str) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "config.json").write_text("{}")
    (tmp_path / "mine" / stranger).mkdir()
    with pytest.raises(ValueError, match=stranger):
        save(tiny.model(), None, tmp_path / "mine")
    assert (tmp_path / "mine" / stranger).is_dir()


def test_prompt_predictor_is_kept_whatever_the_switch_says(tmp_path: Path) -> None:
    sparsifier = tiny.sparsifier(sparsify_prompt=True)
    sparsifier.config.sparsify_prompt = False
    sparsifier.save_pretrained(tmp_path)
    assert Sparsifier.from_pretrained(tmp_path).prompt_predictor is not None


def test_masked_pass_with_a_filled_cache_is_refused() -> None:
    model = tiny.model()
    tiny.sparsifier().attach(model)
    with torch.no_grad():
        past = model(**tiny.row(9)).past_key_values
        ids = torch.tensor([[5, 6]])
        with pytest.raises(ValueError, match="no past_key_values"):
            model(input_ids=ids, past_key_values=past, answer_mask=torch.zeros(1, 2, dtype=torch.bool))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"layer_types": ["full_attention", "linear_attention"]}, "linear_attention"),
        ({"num_kv_shared_layers": 2}, "share keys and values"),
    ],
)
def test_layers_without_keys_of_their_own_are_refused(settings: dict[str, Any], message: str) -> None:
    model = tiny.model()
    for name, value in settings.items():
        setattr(model.model.language_model.config, name, value)
    with pytest.raises(ValueError, match=message):
        tiny.sparsifier().attach(model)
