"""Generate, training, evaluation and lmms-eval see the same pixels of every kind of picture."""

from __future__ import annotations

import importlib
import itertools
import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from transformers import LlavaProcessor

from dynamic_llava.chat.asking import encode
from dynamic_llava.chat.images import as_rgb, open_image
from dynamic_llava.chat.prompt import chat_prompt
from dynamic_llava.data.conversations import BadSample, Conversations
from dynamic_llava.data.training import ConversationDataset
from dynamic_llava.evaluation.batches import encode_questions
from dynamic_llava.evaluation.references import references

SIZE = (60, 40)  # not square: a turned picture has another shape
REFUSED = ("F", "LAB")
MODES = (
    "1", "L", "P", "RGB", "RGBA", "CMYK", "YCbCr", "LAB", "HSV", "I", "F", "LA", "PA", "RGBX", "RGBa", "La",
    "I;16", "I;16B",
)  # fmt: skip
FILES = [
    *itertools.product(("1", "L", "P", "RGB", "RGBA", "LA", "I;16"), ("png",)),
    *itertools.product(("L", "RGB", "CMYK", "YCbCr"), ("jpg",)),
    *itertools.product(("L", "P", "RGB", "RGBA", "LA", "I;16", "I", "CMYK", "LAB", "F", "RGBX"), ("tiff",)),
    *itertools.product(("RGB", "RGBA"), ("webp",)),
    *itertools.product(("L", "P", "RGB", "RGBA"), ("gif",)),
    *itertools.product(("1", "L", "P", "RGB"), ("bmp",)),
    *itertools.product(("L", "RGB", "I;16"), ("ppm",)),
    *itertools.product(("RGB", "RGBA", "LA"), ("jp2",)),
    ("RGBA", "ico"),
]
TRANSPARENT = [("P", "png", 3), ("L", "png", 100), ("RGB", "png", (30, 60, 90)), ("P", "gif", 3)]


def drawn(mode: str) -> Image.Image:
    """A picture that differs in every corner, with transparent parts where the mode has any."""
    height, width = SIZE[1], SIZE[0]
    down, right = np.mgrid[0:height, 0:width]
    rgba_HWC = np.stack(
        [down * 255 // height, right * 255 // width, (down + right) % 256, right * 7 % 256], -1
    )
    rgba = Image.fromarray(rgba_HWC.astype(np.uint8))
    if mode in ("I", "I;16", "I;16B"):
        grey_HW = (down * 1500 + right * 9).astype({"I": "<i4", "I;16": "<u2", "I;16B": ">u2"}[mode])
        return Image.frombytes(mode, SIZE, grey_HW.tobytes())
    if mode in ("La", "PA"):
        between = rgba.convert("LA") if mode == "La" else rgba.convert("P")
        return between.convert(mode)
    if mode == "LAB":
        return Image.frombytes("LAB", SIZE, rgba_HWC[..., :3].astype(np.uint8).tobytes())
    return rgba.convert(mode) if mode in ("RGBa", "LA", "RGBA") else rgba.convert("RGB").convert(mode)


def asked(processor: LlavaProcessor, picture: Image.Image) -> Tensor:
    """Pixels that ``generate`` and ``ask`` feed."""
    pixels = encode(processor, [chat_prompt(processor, "What?", 1)], [picture])["pixel_values"]
    return torch.as_tensor(pixels)


def trained(processor: LlavaProcessor, path: Path) -> Tensor:
    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "red"}]
    data = path.with_suffix(".json")
    data.write_text(json.dumps([{"id": "x", "image": path.name, "conversations": turns}]))
    pixels: Tensor = ConversationDataset(Conversations(data), processor)[0]["pixel_values"]
    return pixels


def evaluated(processor: LlavaProcessor, path: Path) -> Tensor:
    data = path.with_suffix(".jsonl")
    data.write_text(json.dumps({"image": path.name, "question": "What?", "answer": "red"}))
    return torch.as_tensor(encode_questions(processor, references(data, path.parent))["pixel_values"])


@pytest.fixture
def plugin(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The plugin for lmms-eval; where that is not installed, with empty names in its place."""
    try:
        importlib.import_module("lmms_eval")
    except ImportError:
        names = {
            "lmms_eval.api.instance": {"Instance": SimpleNamespace},
            "lmms_eval.api.model": {"lmms": object},
            "lmms_eval.models.model_utils.gen_metrics": {"log_metrics": print},
        }
        for name, content in names.items():
            made = ModuleType(name)
            made.__dict__.update(content)
            monkeypatch.setitem(sys.modules, name, made)
        monkeypatch.delitem(sys.modules, "dynamic_llava.lmms.plugin", raising=False)
    module = importlib.import_module("dynamic_llava.lmms.plugin")
    yield module.DynamicLlava
    if "lmms_eval" not in sys.modules:
        sys.modules.pop("dynamic_llava.lmms.plugin", None)


def scored(plugin: Any, processor: LlavaProcessor, path: Path) -> Tensor:
    """Pixels of a picture that lmms-eval hands over as PIL opens it."""
    model = SimpleNamespace(task_dict={"task": {"test": [0]}})
    with Image.open(path) as image:
        arguments = ("What?", {}, lambda _: [image], 0, "task", "test")
        (picture,) = plugin._pictures(model, SimpleNamespace(args=arguments))
        return asked(processor, picture)


def check_four_ways(plugin: Any, processor: LlavaProcessor, path: Path) -> None:
    expected = asked(processor, open_image(path))
    assert torch.equal(trained(processor, path), expected)
    assert torch.equal(evaluated(processor, path), expected)
    assert torch.equal(scored(plugin, processor, path), expected)
    with Image.open(path) as image:
        assert torch.equal(asked(processor, image), expected)


@pytest.mark.parametrize(("mode", "suffix"), FILES)
def test_files(mode: str, suffix: str, processor: LlavaProcessor, plugin: Any, tmp_path: Path) -> None:
    path = tmp_path / f"picture.{suffix}"
    drawn(mode).save(path)
    with Image.open(path) as image:
        stored = image.mode
    if stored not in REFUSED:
        check_four_ways(plugin, processor, path)
        return
    for way in (open_image, lambda path: trained(processor, path), lambda path: evaluated(processor, path)):
        with pytest.raises(ValueError, match=f"mode {stored} are not supported"):
            way(path)
    with pytest.raises(ValueError, match=f"mode {stored} are not supported"):
        scored(plugin, processor, path)


@pytest.mark.parametrize(("mode", "suffix", "transparency"), TRANSPARENT)
def test_a_transparent_colour(
    mode: str, suffix: str, transparency: Any, processor: LlavaProcessor, plugin: Any, tmp_path: Path
) -> None:
    path = tmp_path / f"picture.{suffix}"
    drawn(mode).save(path, transparency=transparency)
    check_four_ways(plugin, processor, path)


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tiff"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientations(
    orientation: int, suffix: str, processor: LlavaProcessor, plugin: Any, tmp_path: Path
) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / f"picture.{suffix}"
    drawn("RGB").save(path, exif=exif)
    assert open_image(path).size == (SIZE if orientation < 5 else SIZE[::-1])
    check_four_ways(plugin, processor, path)


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_of_pillow_in_memory(mode: str, processor: LlavaProcessor) -> None:
    image = drawn(mode)
    assert image.mode == mode
    if mode in REFUSED:
        with pytest.raises(ValueError, match=f"the picture: pixels of mode {mode} are not supported"):
            asked(processor, image)
        return
    once = as_rgb(image)
    assert (once.mode, once.size) == ("RGB", SIZE)
    assert as_rgb(once).tobytes() == once.tobytes()
    assert torch.equal(asked(processor, image), asked(processor, once))


@pytest.mark.parametrize("mode", ["RGBA", "RGBa", "LA", "La"])
def test_transparency_in_memory_is_laid_on_white(mode: str) -> None:
    image = Image.new("LA" if "L" in mode else "RGBA", SIZE, 0).convert(mode)
    assert as_rgb(image).getpixel((5, 5)) == (255, 255, 255)


@pytest.mark.parametrize(
    ("size", "says"), [((1001, 10), "thinner than 1:100"), ((10_000, 10_001), "64 megapixels")]
)
def test_the_limits_of_size_hold_for_every_way(
    size: tuple[int, int], says: str, processor: LlavaProcessor, plugin: Any, tmp_path: Path
) -> None:
    path = tmp_path / "picture.png"
    Image.new("1", size).save(path)
    with pytest.raises(BadSample, match=rf"^x: .*{says}"):
        trained(processor, path)
    with pytest.raises(ValueError, match=says):
        evaluated(processor, path)
    with pytest.raises(ValueError, match=says):
        asked(processor, Image.new("1", size))
    with pytest.raises(ValueError, match=says):
        scored(plugin, processor, path)


def test_a_broken_picture_handed_over_unread_is_one_line(processor: LlavaProcessor, tmp_path: Path) -> None:
    path = tmp_path / "half.png"
    noise_HWC = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise_HWC).save(path)
    path.write_bytes(path.read_bytes()[:3000])
    with Image.open(path) as image, pytest.raises(ValueError, match=r"half.png: the picture is broken"):
        asked(processor, image)


def test_no_other_file_opens_or_converts_a_picture() -> None:
    source = Path(open_image.__code__.co_filename).parents[1]
    for path in source.rglob("*.py"):
        if path.relative_to(source).as_posix() != "chat/images.py":
            text = path.read_text(encoding="utf-8")
            assert "Image.open(" not in text, path
            assert '.convert("RGB")' not in text, path
