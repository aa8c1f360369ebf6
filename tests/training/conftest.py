"""A small checkpoint to start from, and recipes for it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from dynamic_llava import checkpoints
from dynamic_llava.training import nano
from dynamic_llava.training.recipe import MOVED

SIDE, PATCH = 48, 8

WriteRecipe = Callable[..., Path]


@pytest.fixture(scope="session")
def small_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained LLaVA of 36 image tokens, with a real processor."""
    processor = nano.build_processor(scene_count=50)
    processor.image_processor.size = processor.image_processor.crop_size = {"height": SIDE, "width": SIDE}
    tokenizer = processor.tokenizer
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration(
        LlavaConfig(
            vision_config=CLIPVisionConfig(
                hidden_size=32,
                intermediate_size=64,
                num_hidden_layers=2,
                num_attention_heads=2,
                image_size=SIDE,
                patch_size=PATCH,
            ),
            text_config=LlamaConfig(
                vocab_size=len(tokenizer),
                hidden_size=32,
                intermediate_size=64,
                num_hidden_layers=3,
                num_attention_heads=2,
                num_key_value_heads=2,
                max_position_embeddings=2048,
            ),
            image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
            image_seq_length=(SIDE // PATCH) ** 2,
            vision_feature_layer=-1,
        )
    )
    folder = tmp_path_factory.mktemp("small")
    checkpoints.save(model, processor, folder)
    return folder


@pytest.fixture
def write_recipe(tmp_path: Path, small_checkpoint: Path) -> WriteRecipe:
    """Write a recipe of four steps of the dynamic stage; settings can be changed by name, in any section."""

    def write(name: str, **changes: Any) -> Path:
        settings: dict[str, Any] = {
            "stage": "dynamic",
            "init": str(small_checkpoint),
            "output": str(tmp_path / name),
            "steps": 4,
            "scenes_per_step": 2,
            "easy_vqa_per_step": 1,
            "learning_rate": 1e-3,
            "calibration_steps": 2,
            "save_every": 2,
            "sparsity": {"d_model": 16, "nhead": 2, "dim_feedforward": 32, "min_answer_length": 10},
        }
        sparsity = {**settings["sparsity"], **changes.pop("sparsity", {})}
        settings = {**settings, **changes, "sparsity": sparsity}
        path = tmp_path / f"{name}.yaml"
        path.write_text(yaml.safe_dump(in_sections({k: v for k, v in settings.items() if v is not None})))
        return path

    return write


def in_sections(settings: dict[str, Any]) -> dict[str, Any]:
    """Put each setting into its section; a stage without a method gets none."""
    recipe: dict[str, Any] = {}
    for name, value in settings.items():
        *sections, key = MOVED.get(name, name).split(".")
        place = recipe
        for section in sections:
            place = place.setdefault(section, {})
        place[key] = value
    if settings["stage"] != "dynamic":
        del recipe["method"]
    return recipe
