"""Tiny random models of every family, and prompts with pictures of several sizes for each."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

VOCABULARY, PAD, IMAGE, VIDEO, MARK = 96, 0, 90, 91, 92
HIDDEN, LAYERS = 32, 4
TEXT = {
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "pad_token_id": PAD,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
CLIP = {
    "model_type": "clip_vision_model",
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 4,
    "projection_dim": 16,
}
SIGLIP = CLIP | {"model_type": "siglip_vision_model", "vision_use_head": False}
PIXTRAL = {
    "model_type": "pixtral",
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "head_dim": 8,
    "image_size": 32,
    "patch_size": 4,
    "num_channels": 3,
}
QWEN_TOWER = {"depth": 2, "num_heads": 2, "patch_size": 4, "spatial_merge_size": 2, "temporal_patch_size": 2}
MROPE = {"rope_type": "default", "mrope_section": [2, 1, 1], "rope_theta": 10000.0}


@dataclass
class Picture:
    """Ids that stand for a picture in a prompt, text marks between them, and what the model is given."""

    ids: list[int]
    given: dict[str, Tensor]


@dataclass
class Case:
    """A family: its config, its pictures (number -> picture), and how pictures are put together."""

    config: dict[str, Any]
    picture: Callable[[int], Picture] | None = None
    join: Callable[[str, list[Tensor]], Tensor] = field(default=lambda name, parts: torch.cat(parts))
    per_token: Callable[[Tensor], dict[str, Tensor]] = field(default=lambda ids: {})
    decoder: str = "model.language_model"
    settings: dict[str, Any] = field(default_factory=dict)  # of the sparsifier

    def model(self, attention: str = "sdpa") -> Any:
        """Return a model with random weights, the same each time."""
        torch.manual_seed(0)
        values = dict(self.config)
        config = AutoConfig.for_model(values.pop("model_type"), **values)
        auto = AutoModelForCausalLM if self.picture is None else AutoModelForImageTextToText
        made = auto.from_config(config, attn_implementation=attention).eval()
        for name, parameter in made.named_parameters():
            if parameter.ndim > 1 or "newline" in name:
                torch.nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
        made.generation_config.eos_token_id = None
        made.generation_config.pad_token_id = PAD
        made.generation_config.suppress_tokens = [IMAGE, VIDEO]
        return made

    def row(self, text: int, pictures: int = 1, seed: int = 0) -> dict[str, Tensor]:
        """Return a prompt without padding: a token, pictures with a word before each, ``text`` tokens."""
        generator = torch.Generator().manual_seed(seed)
        words = iter(torch.randint(3, 80, (2 + text + pictures,), generator=generator).tolist())
        shown = [self.picture(seed + number) for number in range(pictures)] if self.picture else []
        ids = [next(words)]
        for picture in shown:
            ids += [*picture.ids, next(words)]
        ids += itertools.islice(words, text)
        return self._given(torch.tensor([ids]), shown)

    def batch(self, rows: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
        """Return rows in one batch, padded on the left."""
        length = max(row["input_ids"].shape[1] for row in rows)
        names = dict.fromkeys(name for row in rows for name in row)
        made = {}
        for name in names:
            parts = [row[name] for row in rows if name in row]
            if (
                parts[0].ndim == 2
                and parts[0].shape[1] == rows[0]["input_ids"].shape[1]
                and "grid" not in name
            ):
                parts = [torch.nn.functional.pad(part, (length - part.shape[1], 0)) for part in parts]
                made[name] = torch.cat(parts)
            else:
                made[name] = self.join(name, parts)
        return made

    def longer(self, inputs: dict[str, Tensor], tokens: Tensor) -> dict[str, Tensor]:
        """Return a row with ``tokens`` after it."""
        ids = torch.cat([inputs["input_ids"], tokens], dim=1)
        return inputs | {"input_ids": ids, "attention_mask": torch.ones_like(ids)} | self.per_token(ids)

    def _given(self, ids: Tensor, shown: Sequence[Picture]) -> dict[str, Tensor]:
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), **self.per_token(ids)}
        names = dict.fromkeys(name for picture in shown for name in picture.given)
        return inputs | {
            name: self.join(name, [p.given[name] for p in shown if name in p.given]) for name in names
        }


def _noise(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _even(tokens: int, side: int = 16) -> Callable[[int], Picture]:
    return lambda number: Picture([IMAGE] * tokens, {"pixel_values": _noise(1, 3, side, side, seed=number)})


def _padded(name: str, parts: list[Tensor]) -> Tensor:
    """Join pictures of different numbers of tiles, or different sizes."""
    if name not in ("pixel_values", "pixel_attention_mask"):
        return torch.cat(parts)
    most = [max(part.shape[axis] for part in parts) for axis in range(1, parts[0].ndim)]
    grown = []
    for part in parts:
        amounts: list[int] = []
        for axis in range(part.ndim - 1, 0, -1):
            amounts += [0, most[axis - 1] - part.shape[axis]]
        grown.append(torch.nn.functional.pad(part, amounts))
    return torch.cat(grown)


NEXT_SIZES = ((16, 32), (32, 32), (32, 14))  # height and width; the second has most tiles
NEXT_TOKENS = {(16, 32): 16 + 4 * 9, (32, 32): 16 + 8 * 9, (32, 14): 0}


def _tiled(
    lengths: dict[tuple[int, int], int], tiles: dict[tuple[int, int], int]
) -> Callable[[int], Picture]:
    def picture(number: int) -> Picture:
        size = list(lengths)[number % len(lengths)]
        pixels = _noise(1, tiles[size], 3, 16, 16, seed=number)
        return Picture([IMAGE] * lengths[size], {"pixel_values": pixels, "image_sizes": torch.tensor([size])})

    return picture


def _qwen(number: int, is_video: bool = False, marks: bool = False) -> Picture:
    height, width = ((4, 4), (4, 8), (6, 4))[number % 3]
    frames = 2 if is_video else 1
    patches = _noise(frames * height * width, 3 * 2 * 4 * 4, seed=number)
    grid = torch.tensor([[frames, height, width]])
    tokens = height * width // 4
    if not is_video:
        return Picture([MARK, *[IMAGE] * tokens, MARK], {"pixel_values": patches, "image_grid_thw": grid})
    ids = [MARK, *[VIDEO] * tokens] * frames if marks else [MARK, *[VIDEO] * (tokens * frames)]
    return Picture(ids, {"pixel_values_videos": patches, "video_grid_thw": grid})


def _mixed(number: int, marks: bool = False) -> Picture:
    return _qwen(number, is_video=number % 2 == 1, marks=marks)


def _token_types(ids: Tensor) -> dict[str, Tensor]:
    return {"mm_token_type_ids": (ids == IMAGE).int() + 2 * (ids == VIDEO).int()}


def _onevision(number: int) -> Picture:
    if number % 3 == 2:
        frames = _noise(1, 3, 3, 16, 16, seed=number)
        return Picture([VIDEO] * (3 * 4 + 1), {"pixel_values_videos": frames})
    return _tiled(ONEVISION_TOKENS, {(16, 32): 3, (32, 32): 5})(number)


ONEVISION_TOKENS = {(16, 32): 16 + 4 * 9, (32, 32): 16 + 8 * 9}


def _sized(patch: int) -> Callable[[int], Picture]:
    """Return pictures of two sizes with a mark after each line, as Pixtral's."""

    def picture(number: int) -> Picture:
        height, width = ((16, 16), (24, 32))[number % 2]
        line = [IMAGE] * (width // patch)
        ids = [*line, MARK] * (height // patch)
        pixels = _noise(1, 3, height, width, seed=number)
        return Picture(ids, {"pixel_values": pixels, "image_sizes": torch.tensor([[height, width]])})

    return picture


def _tiles_of_one_size(tokens: int) -> Callable[[int], Picture]:
    """Return pictures of one or two tiles, each marked."""

    def picture(number: int) -> Picture:
        tiles = 1 + number % 2
        pixels = _noise(1, tiles, 3, 16, 16, seed=number)
        return Picture([MARK, *[IMAGE] * tokens] * tiles, {"pixel_values": pixels})

    return picture


def _internvl(number: int) -> Picture:
    tiles = 1 + number % 2
    return Picture(
        [MARK, *[IMAGE] * (4 * tiles), MARK], {"pixel_values": _noise(tiles, 3, 16, 16, seed=number)}
    )


def _idefics_join(name: str, parts: list[Tensor]) -> Tensor:
    """Join tiles of a row side by side: one entry a row; rows are padded with empty tiles."""
    return _padded(name, parts)


def _flat_text(model_type: str, **more: Any) -> Case:
    return Case({"model_type": model_type, **TEXT, **more}, decoder="model")


def _text(model_type: str, **more: Any) -> dict[str, Any]:
    return {"model_type": model_type, **TEXT, **more}


def _llava(model_type: str, tower: dict[str, Any], text: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {
        "model_type": model_type,
        "vision_config": tower,
        "text_config": text,
        "image_token_id": IMAGE,
        "image_token_index": IMAGE,
        **more,
    }


PINPOINTS = [[16, 32], [32, 16], [32, 32]]
ROPE = {"rope_parameters": MROPE}
QWEN_TEXT = TEXT | ROPE
DEEPSTACK = QWEN_TOWER | {
    "hidden_size": 16,
    "out_hidden_size": HIDDEN,
    "intermediate_size": 16,
    "deepstack_visual_indexes": [0, 1],
    "num_position_embeddings": 64,
}
IDS = {
    "image_token_id": IMAGE,
    "video_token_id": VIDEO,
    "vision_start_token_id": MARK,
    "vision_end_token_id": 93,
}
EXPERTS = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "decoder_sparse_step": 1,
    "norm_topk_prob": True,
}

CASES: dict[str, Case] = {
    "llava": Case(_llava("llava", CLIP, _text("llama"), image_seq_length=16), _even(16)),
    "pixtral": Case(
        _llava(
            "llava", PIXTRAL, _text("mistral"), vision_feature_layer=-1, vision_feature_select_strategy="full"
        ),
        _sized(4),
        join=_padded,
    ),
    "vipllava": Case(
        _llava("vipllava", CLIP, _text("llama"), vision_feature_layers=[-2, -1], image_seq_length=16),
        _even(16),
    ),
    "llava_next": Case(
        _llava("llava_next", CLIP, _text("mistral"), image_grid_pinpoints=PINPOINTS, image_seq_length=16),
        _tiled({(16, 32): 16 + 4 * 9, (32, 32): 16 + 8 * 9}, {(16, 32): 3, (32, 32): 5}),
        join=_padded,
    ),
    "llava_onevision": Case(
        _llava(
            "llava_onevision",
            SIGLIP,
            _text("qwen2"),
            image_grid_pinpoints=PINPOINTS,
            video_token_id=VIDEO,
            video_token_index=VIDEO,
            vision_feature_select_strategy="full",
        ),
        _onevision,
        join=_padded,
    ),
    "qwen2_vl": Case(
        {
            "model_type": "qwen2_vl",
            "text_config": {"model_type": "qwen2_vl_text", **QWEN_TEXT},
            "vision_config": QWEN_TOWER | {"embed_dim": 16, "hidden_size": HIDDEN, "mlp_ratio": 1},
            **IDS,
        },
        _mixed,
        per_token=_token_types,
    ),
    "qwen2_5_vl": Case(
        {
            "model_type": "qwen2_5_vl",
            "text_config": {"model_type": "qwen2_5_vl_text", **QWEN_TEXT},
            "vision_config": QWEN_TOWER
            | {
                "hidden_size": 16,
                "intermediate_size": 16,
                "out_hidden_size": HIDDEN,
                "window_size": 16,
                "fullatt_block_indexes": [1],
            },
            **IDS,
        },
        _mixed,
        per_token=_token_types,
    ),
    "qwen3_vl": Case(
        {
            "model_type": "qwen3_vl",
            "text_config": {"model_type": "qwen3_vl_text", "head_dim": 8, **QWEN_TEXT},
            "vision_config": DEEPSTACK,
            **IDS,
        },
        functools.partial(_mixed, marks=True),
        per_token=_token_types,
    ),
    "qwen3_vl_moe": Case(
        {
            "model_type": "qwen3_vl_moe",
            "text_config": {"model_type": "qwen3_vl_moe_text", "head_dim": 8, **QWEN_TEXT, **EXPERTS},
            "vision_config": DEEPSTACK,
            **IDS,
        },
        functools.partial(_mixed, marks=True),
        per_token=_token_types,
    ),
    "internvl": Case(
        _llava(
            "internvl",
            {
                "model_type": "internvl_vision",
                "hidden_size": 16,
                "intermediate_size": 16,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
                "image_size": [16, 16],
                "patch_size": [4, 4],
            },
            _text("qwen2"),
            image_seq_length=4,
        ),
        _internvl,
    ),
    "idefics3": Case(
        _llava("idefics3", CLIP | {"model_type": "idefics3_vision"}, _text("llama"), scale_factor=2),
        _tiles_of_one_size(4),
        join=_padded,
        decoder="model.text_model",
    ),
    "smolvlm": Case(
        _llava("smolvlm", CLIP | {"model_type": "smolvlm_vision"}, _text("llama"), scale_factor=2),
        _tiles_of_one_size(4),
        join=_padded,
        decoder="model.text_model",
    ),
    "mistral3": Case(
        _llava("mistral3", PIXTRAL, _text("mistral"), vision_feature_layer=-1, spatial_merge_size=2),
        _sized(8),
        join=_padded,
    ),
    "gemma3": Case(
        _llava(
            "gemma3",
            SIGLIP,
            _text(
                "gemma3_text",
                head_dim=8,
                sliding_window=8,
                layer_types=["sliding_attention", "full_attention", "sliding_attention", "full_attention"],
            ),
            mm_tokens_per_image=4,
        ),
        _even(4),
        per_token=lambda ids: {"token_type_ids": (ids == IMAGE).long()},
    ),
    "gemma3_text": _flat_text(
        "gemma3_text", head_dim=8, sliding_window=8, layer_types=["sliding_attention", "full_attention"] * 2
    ),
    "llama": _flat_text("llama"),
    "qwen2": _flat_text("qwen2"),
    "qwen3": _flat_text("qwen3", head_dim=8),
    "mistral": _flat_text("mistral", sliding_window=8),
    "phi3": _flat_text("phi3"),
    "granite": _flat_text("granite", embedding_multiplier=3.0, residual_multiplier=0.5, logits_scaling=2.0),
    "smollm3": _flat_text("smollm3"),
    "cohere2": _flat_text("cohere2", sliding_window=8),
    "glm4": _flat_text("glm4", head_dim=8),
    "olmo2": _flat_text("olmo2"),
}
WITH_PICTURES = [name for name, case in CASES.items() if case.picture]
