"""Golden vectors of the official code, put into a stock model by a small key mapping.

They lie beside the repository; the attention unit is also in tests/data.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from dynamic_llava import Sparsifier, SparsityConfig

ROOT = Path(__file__).parents[3] / "shared" / "golden"
RENAMED = {
    "model.vision_tower.vision_tower.vision_model.": "model.vision_tower.",
    "model.mm_projector.0.": "model.multi_modal_projector.linear_1.",
    "model.mm_projector.2.": "model.multi_modal_projector.linear_2.",
    "model.image_score_predictor.": "sparsifier.image_predictor.",
    "model.output_text_score_predictor.": "sparsifier.text_predictor.",
    "lm_head.": "lm_head.",
    "model.": "model.language_model.",
}


def rename(key: str) -> str:
    """Name a tensor of the official checkpoint as an attached stock model does."""
    prefix = next(old for old in RENAMED if key.startswith(old))
    return RENAMED[prefix] + key.removeprefix(prefix)


def arrays(name: str, root: Path = ROOT) -> dict[str, Tensor]:
    """Read one file of arrays; skip where the golden vectors are not there."""
    path = root / f"{name}.npz"
    if not path.is_file():
        pytest.skip("the golden vectors of the official code are not beside the repository")
    with np.load(path) as file:
        return {key: torch.from_numpy(file[key]) for key in file.files if file[key].dtype.kind in "fiub"}


def strings(name: str, key: str) -> list[str]:
    """Read an array of names of a file that exists."""
    with np.load(ROOT / f"{name}.npz") as file:
        return [str(value) for value in file[key]]


def build(name: str, attention: str, image_token: int) -> tuple[LlavaForConditionalGeneration, Sparsifier]:
    """Build the attached model of one configuration; ``image_token`` must not occur in the data."""
    folder = ROOT / name
    if not folder.is_dir():
        pytest.skip("the golden vectors of the official code are not beside the repository")
    official = json.loads((folder / "checkpoint" / "config.json").read_text())
    vision = json.loads((folder / "vision_tower" / "config.json").read_text())
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    names += ("num_key_value_heads", "rms_norm_eps", "rope_theta", "max_position_embeddings")
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**vision),
        text_config=LlamaConfig(**{key: official[key] for key in names}, pad_token_id=0),
        image_token_id=image_token,
        attn_implementation=attention,
    )
    model = LlavaForConditionalGeneration(config).eval()
    model.generation_config.eos_token_id = None
    sparse = official["sparse_config"]
    sparsifier = Sparsifier(
        SparsityConfig(
            layer=sparse["sparse_layer"],
            image_keep_rate=sparse["vision_keep_rate"],
            text_keep_rate=sparse["output_text_keep_rate"],
            min_answer_length=sparse["output_text_len_for_training"],
            ratio_weight=sparse["mask_loss_weight"],
            **{key: sparse[key] for key in ("d_model", "nhead", "dim_feedforward", "num_layers")},
        ),
        hidden_size=official["hidden_size"],
    )
    sparsifier.attach(model)
    weights = load_file(folder / "checkpoint" / "model.safetensors")
    result = model.load_state_dict({rename(key): tensor for key, tensor in weights.items()}, strict=False)
    assert not result.missing_keys
    assert not [key for key in result.unexpected_keys if not key.endswith("position_ids")]
    return model, sparsifier


def unused_token(*ids: Tensor) -> int:
    """Return a token id that occurs in none of ``ids``."""
    used = {int(token) for tensor in ids for token in tensor.flatten()}
    return next(token for token in range(5, 320) if token not in used)


def expand(ids_BT: Tensor, image_token: int, image_tokens: int) -> Tensor:
    """Replace the placeholder -200 by ``image_tokens`` image tokens, in every row at its own place."""
    rows = []
    for row in ids_BT:
        at = int((row == -200).nonzero()[0])
        rows.append(torch.cat([row[:at], torch.full((image_tokens,), image_token), row[at + 1 :]]))
    return torch.stack(rows)
