"""Shapes, configs and random weights of forged models, in the official format."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from tests.verification.forge.reference import TOWER
from torch import Tensor


@dataclass(frozen=True)
class Shape:
    """What a forged configuration looks like."""

    model_type: str = "dynamic_llava_llama"
    hidden: int = 48
    layers: int = 5
    heads: int = 6
    key_heads: int = 2
    vocabulary: int = 320
    image_size: int = 112
    keep_rate: float = 0.2
    question: bool = False
    seed: int = 0


def configs(shape: Shape) -> tuple[dict[str, Any], dict[str, Any]]:
    vision = {
        "architectures": ["CLIPVisionModel"],
        "model_type": "clip_vision_model",
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "image_size": shape.image_size,
        "patch_size": 14,
        "hidden_act": "quick_gelu",
        "layer_norm_eps": 1e-5,
    }
    sparse = {
        "use_vision_predictor": True,
        "vision_keep_rate": shape.keep_rate,
        "use_text_predictor": True,
        "use_output_text_predictor": True,
        "output_text_keep_rate": 0.5,
        "output_text_len_for_training": 8,
        "use_instruct_predictor": shape.question,
        "instruct_keep_rate": 0.7,
        "instruct_len_for_training": 6,
        "sparse_layer": 2,
        "d_model": 32,
        "nhead": 4,
        "dim_feedforward": 64,
        "num_layers": 2,
        "mask_loss_weight": 100.0,
    }
    config = {
        "architectures": ["DynamicLlavaLlamaForCausalLM"],
        "model_type": shape.model_type,
        "hidden_size": shape.hidden,
        "intermediate_size": 2 * shape.hidden,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.key_heads,
        "vocab_size": shape.vocabulary,
        "max_position_embeddings": 1024,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "rope_scaling": None,
        "hidden_act": "silu",
        "attention_bias": False,
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
        "torch_dtype": "float32",
        "image_aspect_ratio": "pad",
        "mm_hidden_size": 32,
        "mm_patch_merge_type": "flat",
        "mm_projector_type": "mlp2x_gelu",
        "mm_use_im_patch_token": False,
        "mm_use_im_start_end": False,
        "mm_vision_select_feature": "patch",
        "mm_vision_select_layer": -2,
        "mm_vision_tower": "../vision_tower",
        "sparse_config": sparse,
    }
    return config, vision


def random_weights(shape: Shape, config: dict[str, Any], vision: dict[str, Any]) -> dict[str, Tensor]:
    """Random official weights; the text predictors' last layers are large, so that decisions are mixed."""
    generator = torch.Generator().manual_seed(shape.seed)
    weights: dict[str, Tensor] = {}

    def add(name: str, *size: int, bias: bool = False, gain: float = 1.0) -> None:
        weights[f"{name}.weight"] = torch.randn(*size, generator=generator) * gain * size[-1] ** -0.5
        if bias:
            weights[f"{name}.bias"] = 0.1 * torch.randn(size[0], generator=generator)

    def norm(name: str, size: int, bias: bool = True) -> None:
        weights[f"{name}.weight"] = 1 + 0.1 * torch.randn(size, generator=generator)
        if bias:
            weights[f"{name}.bias"] = 0.1 * torch.randn(size, generator=generator)

    c, v, d = shape.hidden, vision["hidden_size"], config["sparse_config"]["d_model"]
    patches, tower = (shape.image_size // 14) ** 2, f"model.{TOWER}"
    add("lm_head", shape.vocabulary, c, gain=2.0)
    add("model.embed_tokens", shape.vocabulary, c, gain=c**0.5)
    norm("model.norm", c, bias=False)
    for i in range(shape.layers):
        layer = f"model.layers.{i}."
        for name in ("input_layernorm", "post_attention_layernorm"):
            norm(layer + name, c, bias=False)
        key_size = c // shape.heads * shape.key_heads
        for name, size in (("q", c), ("k", key_size), ("v", key_size), ("o", c)):
            add(f"{layer}self_attn.{name}_proj", size, c)
        for name, size in (("gate", (2 * c, c)), ("up", (2 * c, c)), ("down", (c, 2 * c))):
            add(f"{layer}mlp.{name}_proj", *size)
    add("model.mm_projector.0", c, v, bias=True)
    add("model.mm_projector.2", c, c, bias=True)
    image = "model.image_score_predictor."
    norm(f"{image}down_mlp.0", c)
    add(f"{image}down_mlp.1", d, c, bias=True)
    for i in range(2):
        block = f"{image}transformer.{i}."
        norm(f"{block}norm1", d)
        norm(f"{block}norm2", d)
        add(f"{block}attn.qkv", 3 * d, d)
        add(f"{block}attn.proj", d, d, bias=True)
        add(f"{block}mlp.fc1", 64, d, bias=True)
        add(f"{block}mlp.fc2", d, 64, bias=True)
    for i, size in ((0, (d // 2, d)), (2, (d // 4, d // 2)), (4, (2, d // 4))):
        add(f"{image}output_mlp.{i}", *size, bias=True, gain=2.0)
    for name in ("output_text", "instruct")[: 1 + shape.question]:
        text = f"model.{name}_score_predictor.output_mlp."
        norm(f"{text}0", c)
        for i, size in ((1, (d, c)), (3, (d // 2, d)), (5, (d // 4, d // 2)), (7, (2, d // 4))):
            add(f"{text}{i}", *size, bias=True, gain=6.0 if i == 7 else 1.5)
        weights[f"{text}7.bias"] = torch.zeros(2)
    add(f"{tower}embeddings.patch_embedding", v, 3, 14, 14, gain=0.5)
    weights[f"{tower}embeddings.class_embedding"] = 0.5 * torch.randn(v, generator=generator)
    add(f"{tower}embeddings.position_embedding", patches + 1, v, gain=2.0)
    norm(f"{tower}pre_layrnorm", v)
    norm(f"{tower}post_layernorm", v)
    for i in range(vision["num_hidden_layers"]):
        layer = f"{tower}encoder.layers.{i}."
        norm(f"{layer}layer_norm1", v)
        norm(f"{layer}layer_norm2", v)
        for name in ("q", "k", "v", "out"):
            add(f"{layer}self_attn.{name}_proj", v, v, bias=True)
        add(f"{layer}mlp.fc1", 64, v, bias=True)
        add(f"{layer}mlp.fc2", v, 64, bias=True)
    return weights
