"""Published models as their configs on the hub describe them: real sizes, no weights, a tiny tokenizer."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from evidence.tiny_processors import KINDS
from transformers import AutoConfig

from evidence import tiny_processors

CLIP = {
    "model_type": "clip_vision_model",
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
    "projection_dim": 768,
}
SIGLIP = {
    "model_type": "siglip_vision_model",
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_hidden_layers": 26,
    "num_attention_heads": 16,
    "image_size": 384,
    "patch_size": 14,
    "vision_use_head": False,
}
INTERNVIT = {
    "model_type": "internvl_vision",
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": [448, 448],
    "patch_size": [14, 14],
}
QWEN_TOWER = {
    "depth": 32,
    "hidden_size": 1280,
    "intermediate_size": 3420,
    "num_heads": 16,
    "patch_size": 14,
    "window_size": 112,
    "fullatt_block_indexes": [7, 15, 23, 31],
    "spatial_merge_size": 2,
}
MROPE = {"rope_type": "default", "mrope_section": [16, 24, 24], "rope_theta": 1e6}
MROPE_3 = MROPE | {"mrope_section": [24, 20, 20], "mrope_interleaved": True, "rope_theta": 5e6}


def _text(model_type: str, hidden: int, inner: int, layers: int, heads: int, keys: int, **more: Any) -> Any:
    return {
        "model_type": model_type,
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": keys,
        "max_position_embeddings": 32768,
        **more,
    }


def _grid(tile: int, sides: int) -> list[list[int]]:
    return [[tile * height, tile * width] for height in range(1, sides + 1) for width in range(1, sides + 1)]


NEXT_GRID = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]
SQUARE = {"size": {"height": 448, "width": 448}, "crop_to_patches": True, "max_patches": 12}


@dataclass(frozen=True)
class Published:
    """A model on the hub: its config, and how its processor sees pictures."""

    hub_id: str
    kind: str
    config: dict[str, Any]
    pictures: dict[str, Any]
    settings: dict[str, Any] = field(default_factory=dict)


def _next(hub_id: str, text: dict[str, Any]) -> Published:
    size = {"height": 336, "width": 336}
    config = {
        "model_type": "llava_next",
        "vision_config": CLIP,
        "text_config": text,
        "image_grid_pinpoints": NEXT_GRID,
        "image_seq_length": 576,
    }
    pictures = {
        "size": {"shortest_edge": 336},
        "crop_size": size,
        "do_center_crop": True,
        "image_grid_pinpoints": NEXT_GRID,
    }
    return Published(hub_id, "llava_next-vicuna", config, pictures, {"patch_size": 14})


def _onevision(hub_id: str, text: dict[str, Any], tied: bool) -> Published:
    config = {
        "model_type": "llava_onevision",
        "vision_config": SIGLIP,
        "text_config": text,
        "tie_word_embeddings": tied,
        "image_grid_pinpoints": _grid(384, 6),
        "vision_aspect_ratio": "anyres_max_9",
    }
    pictures = {"size": {"height": 384, "width": 384}, "image_grid_pinpoints": _grid(384, 6)}
    return Published(hub_id, "llava_onevision", config, pictures, {"num_image_tokens": 729})


def _qwen(hub_id: str, text: dict[str, Any], tied: bool) -> Published:
    tower = QWEN_TOWER | {"out_hidden_size": text["hidden_size"]}
    config = {
        "model_type": "qwen2_5_vl",
        "vision_config": tower,
        "text_config": text | {"rope_parameters": MROPE},
        "tie_word_embeddings": tied,
    }
    return Published(
        hub_id, "qwen2_5_vl", config, {"patch_size": 14, "min_pixels": 3136, "max_pixels": 12845056}
    )


def _qwen3(hub_id: str, text: dict[str, Any], tower: dict[str, Any], tied: bool) -> Published:
    vision = tower | {
        "num_heads": 16,
        "patch_size": 16,
        "out_hidden_size": text["hidden_size"],
        "spatial_merge_size": 2,
        "num_position_embeddings": 2304,
    }
    config = {
        "model_type": "qwen3_vl",
        "vision_config": vision,
        "tie_word_embeddings": tied,
        "text_config": text | {"rope_parameters": MROPE_3, "head_dim": 128},
    }
    return Published(
        hub_id, "qwen3_vl", config, {"patch_size": 16, "min_pixels": 65536, "max_pixels": 16777216}
    )


def _internvl(hub_id: str, text: dict[str, Any]) -> Published:
    config = {
        "model_type": "internvl",
        "vision_config": INTERNVIT,
        "text_config": text,
        "image_seq_length": 256,
        "downsample_ratio": 0.5,
        "tie_word_embeddings": False,
    }
    return Published(hub_id, "internvl", config, SQUARE, {"image_seq_length": 256})


WORDS = (*tiny_processors.TEXT, "the teal star is in the middle right of the picture. Describe.")
QWEN2_7B = (3584, 18944, 28, 28, 4)
PUBLISHED = {
    "llava-next-7b": _next(
        "llava-hf/llava-v1.6-vicuna-7b-hf", _text("llama", 4096, 11008, 32, 32, 32, vocab_size=32064)
    ),
    "llava-onevision-0.5b": _onevision(
        "llava-hf/llava-onevision-qwen2-0.5b-ov-hf",
        _text("qwen2", 896, 4864, 24, 14, 2, vocab_size=152000, tie_word_embeddings=True),
        True,
    ),
    "llava-onevision-7b": _onevision(
        "llava-hf/llava-onevision-qwen2-7b-ov-hf", _text("qwen2", *QWEN2_7B, vocab_size=152000), False
    ),
    "qwen2.5-vl-3b": _qwen(
        "Qwen/Qwen2.5-VL-3B-Instruct",
        _text("qwen2_5_vl_text", 2048, 11008, 36, 16, 2, vocab_size=151936, tie_word_embeddings=True),
        True,
    ),
    "qwen2.5-vl-7b": _qwen(
        "Qwen/Qwen2.5-VL-7B-Instruct", _text("qwen2_5_vl_text", *QWEN2_7B, vocab_size=152064), False
    ),
    "qwen3-vl-4b": _qwen3(
        "Qwen/Qwen3-VL-4B-Instruct",
        _text("qwen3_vl_text", 2560, 9728, 36, 32, 8, vocab_size=151936, tie_word_embeddings=True),
        {
            "depth": 24,
            "hidden_size": 1024,
            "intermediate_size": 4096,
            "deepstack_visual_indexes": [5, 11, 17],
        },
        True,
    ),
    "qwen3-vl-8b": _qwen3(
        "Qwen/Qwen3-VL-8B-Instruct",
        _text("qwen3_vl_text", 4096, 12288, 36, 32, 8, vocab_size=151936),
        {
            "depth": 27,
            "hidden_size": 1152,
            "intermediate_size": 4304,
            "deepstack_visual_indexes": [8, 16, 24],
        },
        False,
    ),
    "internvl3-2b": _internvl(
        "OpenGVLab/InternVL3-2B-hf", _text("qwen2", 1536, 8960, 28, 12, 2, vocab_size=151674)
    ),
    "internvl3-8b": _internvl("OpenGVLab/InternVL3-8B-hf", _text("qwen2", *QWEN2_7B, vocab_size=151674)),
}


def write(name: str, folder: Path) -> Path:
    """Write the config and a processor that sees pictures as the published one does.

    Raises
    ------
    ImportError
        If a package that the processor needs is not there.
    """
    one = PUBLISHED[name]
    kind = KINDS[one.kind]
    kind = replace(kind, settings=kind.settings | one.settings)
    processor: Any = tiny_processors.build(kind, WORDS, 700, **one.pictures)
    known = processor.tokenizer.get_vocab()
    words = ("<image>", "<|image_pad|>", "<IMG_CONTEXT>")
    image = next(known[word] for word in words if word in known)
    config = dict(one.config)
    ids = {"image_token_id": image, "image_token_index": image}
    for key, word in (
        ("video_token_id", "<|video_pad|>"),
        ("vision_start_token_id", "<|vision_start|>"),
        ("vision_end_token_id", "<|vision_end|>"),
    ):
        ids |= {key: known[word]} if word in known else {}
    AutoConfig.for_model(config.pop("model_type"), **config, **ids).save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder
