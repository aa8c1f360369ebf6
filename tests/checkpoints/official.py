"""Tiny checkpoints in the format of the official code, written without the library's own converter."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tests import tiny
from torch import Tensor

RENAMED = {
    "sparsifier.image_predictor.": "model.image_score_predictor.",
    "sparsifier.text_predictor.": "model.output_text_score_predictor.",
    "model.multi_modal_projector.linear_1.": "model.mm_projector.0.",
    "model.multi_modal_projector.linear_2.": "model.mm_projector.2.",
    "model.language_model.": "model.",
    "lm_head.": "lm_head.",
}
TOWER = "model.vision_tower."


def reference() -> Any:
    """The model that :func:`write` writes, its sparsifier attached."""
    model = tiny.model()
    tiny.sparsifier().attach(model)
    return model


def tower_copy() -> dict[str, Tensor]:
    """The tower as some official checkpoints hold it themselves."""
    prefix = "model.vision_tower.vision_tower.vision_model."
    return {
        prefix + name.removeprefix(TOWER): tensor
        for name, tensor in reference().state_dict().items()
        if name.startswith(TOWER)
    }


def write(folder: Path, projector: str = "mlp2x_gelu") -> Path:
    """Write weights, config and, in ``vision_tower/``, the tower."""
    model = reference()
    folder.mkdir()
    state = {}
    for name, tensor in model.state_dict().items():
        prefix = next((old for old in RENAMED if name.startswith(old)), None)
        if prefix is not None:
            state[RENAMED[prefix] + name.removeprefix(prefix)] = tensor.contiguous()
    vision, text = model.config.vision_config, model.config.text_config
    if projector != "mlp2x_gelu":
        state = {name: tensor for name, tensor in state.items() if "mm_projector" not in name}
        state |= _projector(
            projector, 32 if projector == "identity" else vision.hidden_size, text.hidden_size
        )
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    sparse = model.sparsifier.config
    config = {
        "model_type": "dynamic_llava_llama",
        "architectures": ["DynamicLlavaLlamaForCausalLM"],
        "vocab_size": text.vocab_size,
        "hidden_size": text.hidden_size,
        "intermediate_size": text.intermediate_size,
        "num_hidden_layers": text.num_hidden_layers,
        "num_attention_heads": text.num_attention_heads,
        "num_key_value_heads": text.num_key_value_heads,
        "max_position_embeddings": text.max_position_embeddings,
        "rms_norm_eps": text.rms_norm_eps,
        "rope_theta": 10000.0,
        "pad_token_id": 0,
        "tie_word_embeddings": False,
        "image_aspect_ratio": "pad",
        "mm_hidden_size": vision.hidden_size,
        "mm_projector_type": projector,
        "mm_vision_select_feature": "patch",
        "mm_vision_select_layer": -2,
        "mm_vision_tower": "./vision_tower",
        "some_field_of_theirs": [1, 2],
        "sparse_config": {
            "use_vision_predictor": True,
            "vision_keep_rate": sparse.image_keep_rate,
            "use_text_predictor": True,
            "use_output_text_predictor": True,
            "output_text_keep_rate": 0.5,
            "output_text_len_for_training": 50,
            "use_instruct_predictor": False,
            "sparse_layer": sparse.layer,
            "d_model": sparse.d_model,
            "nhead": sparse.nhead,
            "dim_feedforward": sparse.dim_feedforward,
            "num_layers": sparse.num_layers,
            "mask_loss_weight": 100.0,
        },
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    tower = folder / "vision_tower"
    tower.mkdir()
    if projector == "identity":
        _wide_tower(tower)
    else:
        weights = {"vision_model." + k.rsplit("vision_model.", 1)[1]: v for k, v in tower_copy().items()}
        save_file(weights, tower / "model.safetensors", metadata={"format": "pt"})
        (tower / "config.json").write_text(json.dumps(vision.to_dict() | {"model_type": "clip_vision_model"}))
    return folder


def _projector(name: str, vision: int, hidden: int) -> dict[str, Tensor]:
    torch.manual_seed(3)
    if name == "identity":
        return {}
    if name == "linear":
        return {
            "model.mm_projector.weight": torch.randn(hidden, vision),
            "model.mm_projector.bias": torch.ones(hidden),
        }
    shapes = {0: vision, 2: hidden, 4: hidden}
    weights = {f"model.mm_projector.{i}.weight": torch.randn(hidden, n) / n**0.5 for i, n in shapes.items()}
    return weights | {f"model.mm_projector.{i}.bias": torch.randn(hidden) for i in shapes}


def _wide_tower(folder: Path) -> None:
    """A tower as wide as the decoder, for a projector that does nothing."""
    from transformers import CLIPVisionConfig, CLIPVisionModel

    torch.manual_seed(4)
    CLIPVisionModel(
        CLIPVisionConfig(
            hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=16,
            patch_size=4,
        )
    ).save_pretrained(folder)  # fmt: skip
