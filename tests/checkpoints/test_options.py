"""What ``load`` passes on: to transformers, and to the hub for everything that is read from there."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests import tiny
from tests.checkpoints import official_files
from transformers import LlavaForConditionalGeneration

import dynamic_llava
from dynamic_llava import checkpoints, environment

Load = Callable[..., Any]
BOTH = pytest.mark.parametrize("load", [dynamic_llava.load, dynamic_llava.load_model])


class Hub:
    """A hub of folders, which notes how each was asked for."""

    def __init__(self) -> None:
        self.places: dict[str, Path] = {}
        self.asked: dict[str, tuple[Any, ...]] = {}

    def fetch(self, hub_id: str, **how: Any) -> str:
        self.asked[hub_id] = (how["revision"], how["token"], how["cache_dir"])
        return str(self.places[hub_id])


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Hub:
    made = Hub()
    monkeypatch.setattr("dynamic_llava.hub.snapshot_download", made.fetch)
    return made


@pytest.fixture
def stock(tmp_path: Path) -> Path:
    checkpoints.save(tiny.model(), None, tmp_path / "stock")
    return tmp_path / "stock"


DECODER = ["embed_tokens", *(f"layers.{number}" for number in range(4)), "norm", "rotary_emb"]
HOW = {"revision": "v1", "token": "secret", "cache_dir": "/cache"}


@BOTH
def test_model_is_fetched_as_asked(load: Load, hub: Hub, stock: Path) -> None:
    hub.places["someone/model"] = stock
    load("someone/model", **HOW)
    load("someone/model")
    assert hub.asked == {"someone/model": (None, None, None)}
    load("someone/model", **HOW)
    assert hub.asked == {"someone/model": ("v1", "secret", "/cache")}


@BOTH
def test_predictors_and_their_base_are_fetched_as_asked(load: Load, hub: Hub, stock: Path) -> None:
    alone = stock.with_name("alone")
    sparsifier = tiny.sparsifier()
    sparsifier.base_model = "someone/base"
    sparsifier.save_pretrained(alone)
    hub.places = {"someone/base": stock, "someone/alone": alone}
    load("someone/alone", **HOW)
    # The base is another repository, which has no such revision.
    assert hub.asked == {
        "someone/alone": ("v1", "secret", "/cache"),
        "someone/base": (None, "secret", "/cache"),
    }
    hub.asked.clear()
    load(alone, **HOW)
    assert hub.asked == {"someone/base": ("v1", "secret", "/cache")}


@BOTH
def test_tower_is_fetched_as_asked(load: Load, hub: Hub, tmp_path: Path) -> None:
    folder = official_files.write(tmp_path / "official", mm_vision_tower="someone/tower")
    hub.places["someone/tower"] = tmp_path / "official" / "vision_tower"
    load(folder, **HOW)
    assert hub.asked == {"someone/tower": (None, "secret", "/cache")}


def test_sparsifier_is_fetched_as_asked(hub: Hub, tmp_path: Path) -> None:
    tiny.sparsifier().save_pretrained(tmp_path)
    hub.places["someone/alone"] = tmp_path
    dynamic_llava.Sparsifier.from_pretrained("someone/alone", **HOW)
    assert hub.asked == {"someone/alone": ("v1", "secret", "/cache")}


@pytest.mark.parametrize("kind", ["stock", "official"])
def test_transformers_options(kind: str, stock: Path, tmp_path: Path) -> None:
    folder = stock if kind == "stock" else official_files.write(tmp_path / "official")
    for implementation in ("eager", "sdpa"):
        model = dynamic_llava.load_model(folder, attn_implementation=implementation)
        assert model.config.text_config._attn_implementation == implementation
    with pytest.raises(ValueError, match="cannot be read"):
        dynamic_llava.load_model(folder, attn_implementation="no-such-attention")
    pytest.importorskip("accelerate")
    mapped, plain = dynamic_llava.load_model(folder, device_map={"": "cpu"}), dynamic_llava.load_model(folder)
    for name, tensor in plain.state_dict().items():
        torch.testing.assert_close(mapped.state_dict()[name], tensor, msg=name)


def test_map_that_leaves_layers_on_the_disk(stock: Path) -> None:
    pytest.importorskip("accelerate")
    parts = ["vision_tower", "multi_modal_projector", *(f"language_model.{part}" for part in DECODER)]
    on_disk = ("language_model.layers.2", "language_model.layers.3")
    places = {f"model.{part}": "disk" if part in on_disk else "cpu" for part in parts}
    model = dynamic_llava.load_model(stock, device_map={**places, "lm_head": "cpu"})
    assert list(model.hf_device_map.values()).count("disk") == 2
    inputs = tiny.row(9, 1, 0)
    with torch.no_grad():
        torch.testing.assert_close(model(**inputs).logits, dynamic_llava.load_model(stock)(**inputs).logits)


def test_quantizer_gets_the_device_and_the_checkpoints_dtype(
    stock: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: dict[str, Any] = {}
    whole = LlavaForConditionalGeneration.from_pretrained

    def from_pretrained(folder: Path, *, quantization_config: object, **settings: Any) -> Any:
        given.update(settings, quantization_config=quantization_config)
        return whole(folder, **settings)

    monkeypatch.setattr(LlavaForConditionalGeneration, "from_pretrained", from_pretrained)
    asked = object()
    dynamic_llava.load_model(stock, device="cpu", quantization_config=asked)
    assert given["quantization_config"] is asked
    assert (given["device_map"], given["dtype"]) == ({"": torch.device("cpu")}, "auto")


@BOTH
@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        (
            {"device": "cuda:99"},
            ValueError,
            "device is 'cuda:99', but torch sees no such device here: choose",
        ),
        ({"device": "attic"}, ValueError, "device is 'attic', which torch does not know"),
        ({"device": torch.device("meta")}, ValueError, "device is 'meta', but torch sees no such device"),
        ({"device": "cpu", "device_map": "auto"}, ValueError, "device and device_map are both given"),
        ({"dtype": "int8"}, ValueError, "dtype is 'int8': choose float32, bfloat16 or float16"),
        ({"dytpe": "float32"}, TypeError, "takes no 'dytpe'"),
    ],
)
def test_refused_before_anything_is_read(
    load: Load, options: dict[str, Any], kind: type[Exception], message: str
) -> None:
    with pytest.raises(kind, match=message):
        load("someone/never-asked-for", **options)


def test_default_device_is_one_that_is_there() -> None:
    device = environment.default_device()
    assert environment.usable_device(device) == device
    assert torch.ones(1, device=device).item() == 1
