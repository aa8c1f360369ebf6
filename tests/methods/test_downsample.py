"""Smaller pictures: fewer image tokens, the stock model's own interpolation, and nothing left behind."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from PIL import Image
from tests import tiny
from tests.families import trained
from transformers import Dinov2Config, Dinov2Model

import dynamic_llava
from dynamic_llava.chat.asking import ask, dense, encode
from dynamic_llava.chat.prompt import chat_prompt
from dynamic_llava.methods.downsample import downsampled


@pytest.fixture(scope="module")
def nano() -> Any:
    return dynamic_llava.load("nano")


@pytest.mark.parametrize(("rate", "grid"), [(0.05, 2), (0.1, 3), (0.2, 5), (0.5, 8), (1.0, 12)])
def test_tokens_are_at_most_the_budget_and_logits_those_of_stock_interpolation(
    nano: Any, rate: float, grid: int
) -> None:
    model, processor = nano
    image = Image.effect_noise((120, 90), 60).convert("RGB")
    prompt = chat_prompt(processor, "What is it?", 1)
    with dense(model), downsampled(model, processor, rate) as smaller, torch.inference_mode():
        inputs = encode(smaller, [prompt], [image])
        logits = model(**inputs).logits
    ids = inputs["input_ids"]
    assert (ids == model.config.image_token_id).sum() == grid**2 <= max(1, int(144 * rate))
    assert inputs["pixel_values"].shape[-2:] == (8 * grid, 8 * grid)
    with dense(model), torch.inference_mode():
        features = model.get_image_features(
            inputs["pixel_values"],
            interpolate_pos_encoding=True,
            vision_feature_layer=model.config.vision_feature_layer,
            vision_feature_select_strategy=model.config.vision_feature_select_strategy,
        ).pooler_output
        embeds = model.get_input_embeddings()(ids)
        embeds[ids == model.config.image_token_id] = torch.cat(list(features))
        expected = model(inputs_embeds=embeds, attention_mask=inputs["attention_mask"]).logits
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)


def test_everything_is_as_before_also_after_an_error(nano: Any) -> None:
    model, processor = nano
    image = Image.new("RGB", (96, 96), "red")
    before = ask(model, processor, "What is it?", [image], 4)
    with pytest.raises(RuntimeError, match="inside"), downsampled(model, processor, 0.2):
        raise RuntimeError("inside")
    assert ask(model, processor, "What is it?", [image], 4).text == before.text
    assert processor.image_processor.size["height"] == 96
    assert not model.model.vision_tower._forward_pre_hooks


@pytest.mark.parametrize("rate", [0.0, 1.5])
def test_wrong_rates_are_refused(nano: Any, rate: float) -> None:
    with pytest.raises(ValueError, match="keep rate"), downsampled(*nano, rate):
        pass


def test_towers_and_processors_that_cannot_are_refused(nano: Any) -> None:
    model, processor = nano
    stub = tiny.model()
    stub.model.vision_tower = torch.nn.Identity()
    with pytest.raises(ValueError, match="no vision tower"), downsampled(stub, processor, 0.2):
        pass
    other = type("Odd", (), {"image_processor": type("P", (), {"size": {"longest_edge": 9}})()})()
    with pytest.raises(ValueError, match="no square pictures"), downsampled(model, other, 0.2):
        pass


def test_a_tower_that_always_interpolates_is_not_asked_to(nano: Any) -> None:
    config = Dinov2Config(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=160, patch_size=8
    )
    stub = tiny.model()
    stub.model.vision_tower = Dinov2Model(config).eval()
    with downsampled(stub, nano[1], 0.2) as smaller, torch.inference_mode():
        pixels = smaller.image_processor(Image.new("RGB", (50, 40)), return_tensors="pt")["pixel_values"]
        assert stub.model.vision_tower(pixels).last_hidden_state.shape == (1, 1 + 5 * 5, 16)
        assert not stub.model.vision_tower._forward_pre_hooks


@pytest.mark.parametrize("kind", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
@pytest.mark.parametrize("rate", [0.05, 0.2, 0.5, 1.0])
def test_a_limit_of_pixels_leaves_each_picture_its_share(kind: str, rate: float) -> None:
    model, processor = trained.model(kind), trained.processor(kind)
    images = [Image.effect_noise(size, 60).convert("RGB") for size in ((64, 40), (24, 32), (16, 120))]
    prompt = chat_prompt(processor, "What is it?", 3)
    whole = encode(processor, [prompt], images)
    with downsampled(model, processor, rate) as smaller, torch.no_grad():
        inputs = encode(smaller, [prompt], images)
        model(**inputs)
    before, after = (grid["image_grid_thw"].prod(-1) // 4 for grid in (whole, inputs))
    assert all(0 < now <= max(1, int(then * rate)) for now, then in zip(after, before, strict=True))
    assert (inputs["input_ids"] == model.config.image_token_id).sum() == after.sum()
    if rate == 1.0:
        assert all(torch.equal(inputs[name], value) for name, value in whole.items())
    assert encode(processor, [prompt], images).keys() == whole.keys()
    assert torch.equal(encode(processor, [prompt], images)["pixel_values"], whole["pixel_values"])


@pytest.mark.parametrize("kind", ["llava_next-vicuna", "llava_onevision", "internvl", "idefics3", "gemma3"])
def test_pictures_in_tiles_or_of_one_size_are_refused(kind: str) -> None:
    with (
        pytest.raises(ValueError, match=r"cannot be downsampled|no vision tower that takes"),
        downsampled(trained.model(kind), trained.processor(kind), 0.2),
    ):
        pass
