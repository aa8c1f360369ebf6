"""Small random checkpoints of each family that vLLM serves sparse, with heads of a size that it takes."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    LlavaNextImageProcessor,
    LlavaNextProcessor,
    LlavaOnevisionImageProcessor,
    LlavaOnevisionProcessor,
    LlavaOnevisionVideoProcessor,
    LlavaProcessor,
    Qwen2_5_VLProcessor,
    Qwen2VLImageProcessor,
    Qwen2VLProcessor,
    Qwen2VLVideoProcessor,
    Qwen3VLProcessor,
    Qwen3VLVideoProcessor,
)

from dynamic_llava import Sparsifier, SparsityConfig, checkpoints

WIDTH, LAYERS, HEAD = 64, 4, 32
CLIP = {
    "model_type": "clip_vision_model", "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2,
    "num_attention_heads": 2, "image_size": 16, "patch_size": 4, "projection_dim": 16,
}  # fmt: skip
SIGLIP = CLIP | {"model_type": "siglip_vision_model", "vision_use_head": False}
QWEN_TOWER = {
    "depth": 2, "num_heads": 2, "patch_size": 4, "spatial_merge_size": 2, "temporal_patch_size": 2,
    "in_channels": 3,
}  # fmt: skip
PINPOINTS = [[16, 32], [32, 16], [32, 32]]
MROPE = {"rope_type": "default", "mrope_section": [4, 6, 6], "rope_theta": 10000.0}
SIDE = {"height": 16, "width": 16}
SIZE = {"shortest_edge": 64, "longest_edge": 1024}  # pixels, of Qwen's processors
MARKS = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>", "<video>")


@dataclass(frozen=True)
class Kind:
    """A family: its config, given a tokenizer, its processor, and what stands for a picture in a prompt."""

    config: Callable[[Any], dict[str, Any]]
    processor: Callable[[Any], Any]
    picture: str


def text(tokenizer: Any, model_type: str, **more: Any) -> dict[str, Any]:
    sizes = {"hidden_size": WIDTH, "intermediate_size": 64, "num_hidden_layers": LAYERS, "head_dim": HEAD}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 2048}
    ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    size = {"vocab_size": len(tokenizer), "tie_word_embeddings": False}
    return {"model_type": model_type, **sizes, **heads, **ids, **size, **more}


def llava_like(
    model_type: str, tower: dict[str, Any], decoder: str, **more: Any
) -> Callable[[Any], dict[str, Any]]:
    def config(tokenizer: Any) -> dict[str, Any]:
        image, video = (tokenizer.convert_tokens_to_ids(mark) for mark in ("<image>", "<video>"))
        ids = {
            "image_token_index": image,
            "image_token_id": image,
            "video_token_index": video,
            "video_token_id": video,
        }
        parts = {"vision_config": tower, "text_config": text(tokenizer, decoder)}
        return {"model_type": model_type, "image_grid_pinpoints": PINPOINTS, **ids, **parts, **more}

    return config


def qwen_like(model_type: str, tower: dict[str, Any]) -> Callable[[Any], dict[str, Any]]:
    def config(tokenizer: Any) -> dict[str, Any]:
        begin, end, image, video, _ = (tokenizer.convert_tokens_to_ids(mark) for mark in MARKS)
        ids = {
            "image_token_id": image,
            "video_token_id": video,
            "vision_start_token_id": begin,
            "vision_end_token_id": end,
        }
        rope = MROPE | ({"mrope_interleaved": True} if model_type == "qwen3_vl" else {})
        decoder = text(tokenizer, f"{model_type}_text", rope_parameters=rope)
        return {"model_type": model_type, "vision_config": QWEN_TOWER | tower, "text_config": decoder, **ids}

    return config


def tiled(processor: Any, images: Any, **more: Any) -> Callable[[Any], Any]:
    def make(tokenizer: Any) -> Any:
        return processor(image_processor=images, tokenizer=tokenizer, image_token="<image>", **more)

    return make


def qwen_processor(processor: Any, video: Any) -> Callable[[Any], Any]:
    def make(tokenizer: Any) -> Any:
        sizes = {"patch_size": 4, "merge_size": 2, "temporal_patch_size": 2, "size": SIZE}
        images, videos = Qwen2VLImageProcessor(**sizes), video(**sizes)
        return processor(image_processor=images, tokenizer=tokenizer, video_processor=videos)

    return make


CLIP_FEATURES = {
    "patch_size": 4,
    "vision_feature_select_strategy": "default",
    "num_additional_image_tokens": 1,
}
QWEN_PICTURE = "<|vision_start|><|image_pad|><|vision_end|>"
QWEN_SIZES = {"hidden_size": 32, "intermediate_size": 32, "out_hidden_size": WIDTH}
ANYRES = "anyres_max_9"
FAMILIES = {
    "llava_next": Kind(
        llava_like("llava_next", CLIP, "llama", vision_feature_layer=-1),
        tiled(
            LlavaNextProcessor,
            LlavaNextImageProcessor(size=SIDE, crop_size=SIDE, image_grid_pinpoints=PINPOINTS),
            **CLIP_FEATURES,
        ),
        "<image>",
    ),
    "llava_onevision": Kind(
        llava_like(
            "llava_onevision",
            SIGLIP,
            "qwen2",
            vision_feature_layer=-1,
            vision_feature_select_strategy="full",
            vision_aspect_ratio=ANYRES,
        ),
        tiled(
            LlavaOnevisionProcessor,
            LlavaOnevisionImageProcessor(size=SIDE, image_grid_pinpoints=PINPOINTS),
            video_processor=LlavaOnevisionVideoProcessor(size=SIDE),
            num_image_tokens=16,
            vision_feature_select_strategy="full",
            video_token="<video>",
            vision_aspect_ratio=ANYRES,
        ),
        "<image>",
    ),
    "qwen2_vl": Kind(
        qwen_like("qwen2_vl", {"embed_dim": 32, "hidden_size": WIDTH, "mlp_ratio": 1}),
        qwen_processor(Qwen2VLProcessor, Qwen2VLVideoProcessor),
        QWEN_PICTURE,
    ),
    "qwen2_5_vl": Kind(
        qwen_like("qwen2_5_vl", QWEN_SIZES | {"window_size": 16, "fullatt_block_indexes": [1]}),
        qwen_processor(Qwen2_5_VLProcessor, Qwen2VLVideoProcessor),
        QWEN_PICTURE,
    ),
    "qwen3_vl": Kind(
        qwen_like(
            "qwen3_vl", QWEN_SIZES | {"deepstack_visual_indexes": [0, 1], "num_position_embeddings": 64}
        ),
        qwen_processor(Qwen3VLProcessor, Qwen3VLVideoProcessor),
        QWEN_PICTURE,
    ),
}


def written(name: str, nano: LlavaProcessor, folder: Path) -> Path:
    """Write a checkpoint of a family whose predictors drop some tokens of either kind."""
    kind, tokenizer = FAMILIES[name], deepcopy(nano.tokenizer)
    tokenizer.add_special_tokens({"additional_special_tokens": list(MARKS)})
    values = kind.config(tokenizer)
    config = AutoConfig.for_model(values.pop("model_type"), **values)
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(config).eval()
    for parameter_name, parameter in model.named_parameters():
        if parameter.ndim > 1 or "newline" in parameter_name:
            torch.nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    settings = SparsityConfig(layer=2, image_keep_rate=0.4, d_model=16, nhead=2, dim_feedforward=16)
    sparsifier = Sparsifier(settings, WIDTH).eval()
    for parameter in sparsifier.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=2 * parameter.shape[-1] ** -0.5)
    sparsifier.attach(model)
    checkpoints.save(model, kind.processor(tokenizer), folder)
    return folder


SIDES = ((16, 16), (32, 16), (30, 40), (16, 24))
COUNT = 8


def pictures(count: int, seed: int) -> list[Image.Image]:
    """Return pictures of several sizes, of noise."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for number in range(count):
        width, height = SIDES[(seed + number) % len(SIDES)]
        noise = torch.randint(256, (height, width, 3), generator=generator, dtype=torch.uint8)
        found.append(Image.fromarray(noise.numpy()))
    return found


def asked(name: str, most: int) -> list[Any]:
    """Return requests with 0 to so many pictures; some have rates of their own."""
    from evidence.serving_engine import Asked

    rates: list[dict[str, Any]] = [{}, {"image_keep_rate": 0.7}, {"dense": True}]
    found = []
    for number in range(COUNT):
        shown = pictures(number % (most + 1), number)
        prompt = f"USER: {FAMILIES[name].picture * len(shown)} What is there? {number} ASSISTANT:"
        found.append(Asked(prompt, shown, 10 + number, rates[number % len(rates)]))
    return found
