"""Processors of official checkpoints: added tokens, padding, prompts."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from tests.checkpoints import official_files
from tests.checkpoints.official_files import (
    change_config,
    change_tensors,
    config_of,
    tensors_of,
    without_predictors,
    write_tokenizer,
)
from transformers import AutoProcessor, LlavaForConditionalGeneration

from dynamic_llava import checkpoints

CHAT = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "w1 w2"}]}]


def write_with_rows(tmp_path: Path, rows: int, **changes: Any) -> Path:
    """A checkpoint whose vocabulary has ``rows`` more rows."""
    folder = official_files.write(tmp_path, vocab_size=40 + rows, **changes)
    tensors = tensors_of(folder)
    for name in ("lm_head.weight", "model.embed_tokens.weight"):
        change_tensors(folder, **{name: torch.cat([tensors[name], torch.randn(rows, 32)])})
    return folder


def answer(model: Any, processor: Any) -> tuple[str, list[int], list[int]]:
    """Prompt, its tokens, and the tokens of the answer."""
    prompt = processor.apply_chat_template(CHAT, add_generation_prompt=True, tokenize=False)
    picture = Image.new("RGB", (50, 20), "red")
    inputs = processor(text=prompt, images=[picture], return_tensors="pt")
    tokens = model.generate(**inputs, max_new_tokens=5, do_sample=False)
    length = inputs["input_ids"].shape[1]
    return prompt, tokens[0, :length].tolist(), tokens[0, length:].tolist()


def test_tokenizer_without_image_token(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    folder = official_files.write(tmp_path)
    write_tokenizer(folder)
    capfd.readouterr()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loaded = checkpoints.load(folder)
    assert capfd.readouterr().err == ""
    prompt, tokens, said = answer(*loaded)
    assert prompt == "USER: <image>\nw1 w2 ASSISTANT:"
    assert tokens == [0, 40, 40, 40, 40, 4, 5, 0]
    ours, back = tmp_path / "ours", tmp_path / "back"
    checkpoints.convert(folder, ours)
    checkpoints.convert(ours, back, to="official")
    assert answer(*checkpoints.load(ours))[1:] == (tokens, said)
    for file in folder.iterdir():
        assert (back / file.name).read_bytes() == file.read_bytes() or file.suffix == ".safetensors"
    plain = LlavaForConditionalGeneration.from_pretrained(ours), AutoProcessor.from_pretrained(ours)
    assert answer(*plain)[1] == tokens


def test_vocabulary_with_spare_rows_does_not_grow(tmp_path: Path) -> None:
    folder = write_with_rows(tmp_path, 24)
    write_tokenizer(folder)
    for model in (checkpoints.load(folder)[0], checkpoints.load_model(folder)):
        assert model.config.image_token_id == 40
        assert model.lm_head.weight.shape == (64, 32)


def test_picture_between_start_and_end(tmp_path: Path) -> None:
    folder = write_with_rows(tmp_path, 2, mm_use_im_start_end=True)
    write_tokenizer(folder, "<im_start>", "<im_end>")
    prompt, tokens, _ = answer(*checkpoints.load(folder))
    assert prompt == "USER: <im_start><image><im_end>\nw1 w2 ASSISTANT:"
    assert tokens[1:7] == [40, 42, 42, 42, 42, 41]


def test_patch_token_changes_nothing(tmp_path: Path) -> None:
    folder = write_with_rows(tmp_path, 1, mm_use_im_patch_token=True)
    write_tokenizer(folder, "<im_patch>")
    assert answer(*checkpoints.load(folder))[1][1:5] == [41] * 4


@pytest.mark.parametrize(
    ("aspect", "pads"),
    [("pad", True), ("square", False), (None, False), ("anyres", True), ("anyres_max_9", True)],
)
def test_pictures_are_padded_as_the_config_says(aspect: str | None, pads: bool, tmp_path: Path) -> None:
    folder = official_files.write(tmp_path)
    official_files.write_config(folder, config_of(folder) | {"image_aspect_ratio": aspect})
    write_tokenizer(folder)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        processor: Any = checkpoints.load(folder)[1]
    assert processor.image_processor.do_pad == pads
    assert any("tiles are not supported" in str(w.message) for w in caught) == ("anyres" in str(aspect))


def test_mistral_prompts(tmp_path: Path) -> None:
    folder = official_files.write(tmp_path)
    without_predictors(folder)
    change_config(folder, model_type="llava_mistral")
    write_tokenizer(folder)
    assert answer(*checkpoints.load(folder))[0] == "[INST] <image>\nw1 w2 [/INST]"
