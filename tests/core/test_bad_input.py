"""What is wrong is refused in one line that says what and where."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests import tiny
from transformers import DynamicCache

import dynamic_llava
from dynamic_llava import Sparsifier, SparsityConfig, checkpoints


@pytest.mark.parametrize("name", ["image_keep_rate", "text_keep_rate", "prompt_keep_rate"])
@pytest.mark.parametrize("rate", [0, -0.1, 1.0001, float("nan")])
def test_keep_rates_outside_their_range(name: str, rate: float) -> None:
    with pytest.raises(ValueError, match=name):
        SparsityConfig(**{name: rate})


@pytest.mark.parametrize(
    "settings",
    [
        {"layer": 0},
        {"image_policy": None},
        {"text_policy": ""},
        {"nhead": 0},
        {"d_model": 30, "nhead": 4},
        {"min_answer_length": -1},
        {"ratio_weight": -1.0},
        {"min_prompt_length": -1},
        {"softmax_eps": -1e-6},
    ],
)
def test_settings_out_of_range(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(settings))):
        SparsityConfig(**settings)


def test_config_survives_the_way_through_json() -> None:
    config = SparsityConfig(layer=3, image_keep_rate=0.3, seed=4)
    assert SparsityConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    with pytest.raises(ValueError, match="keep_rate_image"):
        SparsityConfig.from_dict({"keep_rate_image": 0.5})


def test_config_edited_later_is_checked_at_the_next_call() -> None:
    model, sparsifier = tiny.model(), tiny.sparsifier()
    sparsifier.attach(model)
    sparsifier.config.image_keep_rate = 0.0
    with pytest.raises(ValueError, match="image_keep_rate is 0"):
        model(**tiny.row(4))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: tiny.sparsifier(layer=4), "layer is 4: the decoder has 4 layers"),
        (lambda: Sparsifier(SparsityConfig(), hidden_size=64), "hidden_size is 64"),
    ],
)
def test_sparsifier_that_does_not_fit(make: Callable[[], Sparsifier], message: str) -> None:
    model = tiny.model()
    with pytest.raises(ValueError, match=message):
        make().attach(model)
    assert not hasattr(model, "sparsifier")


def test_attaching_twice() -> None:
    model = tiny.model()
    tiny.sparsifier().attach(model)
    with pytest.raises(ValueError, match="attached already"):
        tiny.sparsifier().attach(model)


def test_unsupported_attention() -> None:
    model = tiny.model()
    model.model.language_model.config._attn_implementation = "paged_attention"
    with pytest.raises(ValueError, match="paged_attention"):
        tiny.sparsifier().attach(model)


def test_attention_changed_while_attached() -> None:
    model = tiny.model("sdpa")
    tiny.sparsifier().attach(model)
    model.set_attn_implementation("eager")
    with pytest.raises(ValueError, match="detach, set it, attach again"):
        model(**tiny.row(4))


def test_labels_need_an_answer_mask() -> None:
    model, sparsifier = tiny.model(), tiny.sparsifier()
    sparsifier.attach(model)
    row = tiny.row(4)
    with pytest.raises(ValueError, match="answer_mask"):
        model(**row, labels=row["input_ids"])
    with pytest.raises(ValueError, match=r"answer_mask is \(1, 3\)"):
        model(**row, answer_mask=torch.zeros(1, 3, dtype=torch.bool))


def test_caches_that_cannot_be_used() -> None:
    model = tiny.model()
    row = tiny.row(4)
    filled = model(**row).past_key_values
    sparsifier = tiny.sparsifier()
    sparsifier.attach(model)
    with pytest.raises(ValueError, match="past_key_values is a DynamicCache"):
        model(**row, past_key_values=filled)
    with pytest.raises(ValueError, match="past_key_values is a DynamicCache"):
        model(**row, past_key_values=filled, use_cache=False)
    with pytest.raises(ValueError, match="of another run"):
        model(**row, past_key_values=sparsifier.new_prompt(99), use_cache=False)
    own = model(**row).past_key_values
    with pytest.raises(ValueError, match="holds 1 rows, the call has 2"):
        model(torch.full((2, 1), 5), past_key_values=own)
    with pytest.raises(ValueError, match="cannot be cropped"):
        own.crop(-1)
    sparsifier.config.layer = 3
    with pytest.raises(ValueError, match="sparse from 2"):
        model(torch.full((1, 1), 5), past_key_values=own)
    sparsifier.detach()
    with pytest.raises(ValueError, match="outside of a pass"):
        model(torch.full((1, 1), 5), past_key_values=own)
    assert isinstance(filled, DynamicCache)


def test_more_pictures_than_placeholders() -> None:
    model = tiny.model()
    tiny.sparsifier().attach(model)
    row = tiny.row(4)
    with pytest.raises(ValueError, match="0 image tokens for 1 pictures"):
        model(row["input_ids"][:, 17:], row["pixel_values"])
    with pytest.raises(ValueError, match="16 image tokens for 3 pictures"):
        model(row["input_ids"], row["pixel_values"].repeat(3, 1, 1, 1))


def test_chunked_prefill_and_speculative_decoding() -> None:
    model = tiny.model()
    tiny.sparsifier().attach(model)
    with pytest.raises(ValueError, match="prefill_chunk_size"):
        model.generate(**tiny.row(9), max_new_tokens=4, prefill_chunk_size=8)
    with pytest.raises(ValueError, match=r"speculative|Assisted decoding"):
        model.generate(**tiny.row(30), max_new_tokens=20, prompt_lookup_num_tokens=3)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    model = tiny.model()
    tiny.sparsifier().attach(model)
    checkpoints.save(model, None, tmp_path / "model")
    return tmp_path / "model"


def test_checkpoint_survives_saving_and_loading(checkpoint: Path) -> None:
    model = tiny.model()
    tiny.sparsifier().attach(model)
    loaded, processor = dynamic_llava.load(checkpoint)
    assert processor is None
    assert torch.equal(loaded(**tiny.row(4)).logits, model(**tiny.row(4)).logits)
    assert loaded.sparsifier.config == model.sparsifier.config
    assert not [key for key in load_file(checkpoint / "model.safetensors") if "sparsifier" in key]
    checkpoints.save(loaded, None, checkpoint)
    assert [path.name for path in checkpoint.parent.iterdir()] == ["model"]


def test_attached_model_saves_the_stock_checkpoint(tmp_path: Path) -> None:
    model, sparsifier = tiny.model(), tiny.sparsifier()
    model.save_pretrained(tmp_path / "stock")
    sparsifier.attach(model)
    model.save_pretrained(tmp_path / "attached")
    sparsifier.save_pretrained(tmp_path / "attached")
    stock, attached = (load_file(tmp_path / name / "model.safetensors") for name in ("stock", "attached"))
    assert stock.keys() == attached.keys()
    assert all(torch.equal(tensor, attached[name]) for name, tensor in stock.items())
    again = Sparsifier.from_pretrained(tmp_path / "attached")
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), sparsifier.parameters(), strict=True))


def _edit(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    if path.suffix == ".json":
        values = json.loads(path.read_text())
        change(values)
        path.write_text(json.dumps(values))
    else:
        tensors = load_file(path)
        change(tensors)
        save_file(tensors, path, metadata={"format": "pt"})


def _first(tensors: dict[str, Any]) -> str:
    return next(key for key in tensors if key.endswith("weight"))


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        ("model.safetensors", lambda t: t.pop(_first(t)), "1 tensors are missing"),
        ("model.safetensors", lambda t: t.update({_first(t): torch.zeros(2, 2)}), "1 tensors are misshapen"),
        ("model.safetensors", lambda t: t.update(extra=torch.zeros(1)), "1 tensors are unexpected"),
        ("sparsifier.safetensors", lambda t: t.pop(_first(t)), "is missing"),
        (
            "sparsifier.safetensors",
            lambda t: t.update({_first(t): torch.zeros(2)}),
            r"shape \(2,\), expected",
        ),
        ("sparsifier_config.json", lambda c: c.update(layer=0), "layer is 0"),
        ("sparsifier_config.json", lambda c: c.update(layer=9), "layer is 9"),
        ("sparsifier_config.json", lambda c: c.pop("hidden_size"), "is no sparsifier config"),
        ("config.json", lambda c: c.update(model_type="llava_llama"), "holds a llava_llama model"),
        ("config.json", lambda c: c.update(model_type="gpt2"), "gpt2"),
    ],
)
def test_checkpoint_with_a_fault(checkpoint: Path, file: str, change: Any, message: str) -> None:
    _edit(checkpoint / file, change)
    with pytest.raises(ValueError, match=message) as caught:
        dynamic_llava.load_model(checkpoint)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("file", ["model.safetensors", "sparsifier.safetensors", "config.json"])
def test_checkpoint_with_a_broken_file(checkpoint: Path, file: str) -> None:
    (checkpoint / file).write_bytes(b"not what it should be")
    with pytest.raises(ValueError, match=str(checkpoint)):
        dynamic_llava.load_model(checkpoint)


def test_checkpoint_with_half_a_sparsifier(checkpoint: Path) -> None:
    (checkpoint / "sparsifier_config.json").unlink()
    with pytest.raises(FileNotFoundError, match="sparsifier_config"):
        dynamic_llava.load_model(checkpoint)


def test_checkpoints_that_are_not_there(tmp_path: Path, checkpoint: Path) -> None:
    for source in (
        "no-such-model",
        str(tmp_path / "nowhere"),
        tmp_path / "nowhere",
        tmp_path,
        "owner/no-such-model",
    ):
        with pytest.raises(FileNotFoundError):
            dynamic_llava.load(source)
    with pytest.raises(ValueError, match="vision_tower"):
        dynamic_llava.load(checkpoint, vision_tower="tower")
    with pytest.raises(ValueError, match="dtype is 'float7'"):
        dynamic_llava.load(checkpoint, dtype="float7")


def test_saving_does_not_replace_what_is_no_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(ValueError, match="no part of a checkpoint"):
        checkpoints.save(tiny.model(), None, tmp_path)
    assert (tmp_path / "thesis.txt").read_text() == "years of work"
