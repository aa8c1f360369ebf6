"""The three stages: the model that each starts from, its objective, and what is saved at the end."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import LlavaForConditionalGeneration, LlavaProcessor

from dynamic_llava import checkpoints
from dynamic_llava.config import SparsityConfig
from dynamic_llava.sparsifier import Sparsifier
from dynamic_llava.training import nano
from dynamic_llava.training.calibration import set_text_threshold
from dynamic_llava.training.nano import patches
from dynamic_llava.training.recipe import Recipe
from dynamic_llava.training.stages.dense import DenseObjective
from dynamic_llava.training.stages.dynamic import SparseObjective
from dynamic_llava.training.stages.objective import Objective
from dynamic_llava.training.stages.vision import VisionObjective

LORA_TARGETS = r".*language_model.*\.(q|k|v|o|gate|up|down)_proj"


@dataclass(frozen=True)
class Stage:
    """A model ready to be trained; ``adapted`` is peft's wrapper of it, or None."""

    objective: Objective
    model: LlavaForConditionalGeneration
    processor: LlavaProcessor
    adapted: Any


def build(recipe: Recipe) -> Stage:
    """Load or make the model of a stage, and freeze what it does not train.

    The dynamic stage goes on from the predictors that its model may have.
    """
    if recipe.stage == "vision":
        return _vision(recipe)
    model, processor = _load(recipe)
    trained = _detached(model)
    model.model.vision_tower.requires_grad_(recipe.train_vision_tower)
    model.model.multi_modal_projector.requires_grad_(recipe.train_projector)
    if recipe.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if recipe.stage == "dense" and trained is not None:
        raise ValueError(f"{recipe.init}: init has a sparsifier, which the dense stage would lose")
    if recipe.stage == "dense":
        return Stage(DenseObjective(model), model, processor, None)
    teacher = copy.deepcopy(model) if recipe.distill_weight else None
    torch.manual_seed(recipe.seed)
    hidden_size = cast(nn.Embedding, model.get_input_embeddings()).embedding_dim
    sparsifier = Sparsifier(SparsityConfig.from_dict(recipe.sparsity or {}), hidden_size)
    if trained is not None:
        _take_over(sparsifier, trained, recipe)
    adapted = _adapt(model, recipe)
    sparsifier.attach(model)
    sparsifier.float()  # beside 16-bit weights too, for their updates are small
    return Stage(SparseObjective(model, recipe, teacher), model, processor, adapted)


def finish(stage: Stage, recipe: Recipe, unseen: Iterable[Mapping[str, Any]], folder: Path) -> None:
    """Set the output predictor's threshold and write the finished model.

    Parameters
    ----------
    unseen
        Groups of rows on which the threshold is set.
    """
    model = stage.model
    sparsifier = cast(Sparsifier | None, getattr(model, "sparsifier", None))
    if sparsifier is not None:
        sparsifier.train_rates = None
        sparsifier.to(dtype=model.dtype)
        config = sparsifier.config
        if config.sparsify_text and config.text_policy == "learned":
            set_text_threshold(model, sparsifier, unseen)
        sparsifier.detach()  # peft takes its adapters out of the stock model
        if stage.adapted is not None and recipe.merge_lora:
            stage.adapted.merge_and_unload()
        elif stage.adapted is not None:
            stage.adapted.save_pretrained(folder.with_name("lora"))
            stage.adapted.unload()
        sparsifier.attach(model)
    model.to(getattr(torch, recipe.save_dtype))
    checkpoints.save(model, stage.processor, folder)


def _vision(recipe: Recipe) -> Stage:
    processor = nano.build_processor()
    model = nano.build_model(processor, recipe.seed)
    features = model.model.multi_modal_projector.linear_1.in_features
    heads = patches.PatchHeads(features, side=nano.IMAGE_SIDE // nano.PATCH_SIDE)
    return Stage(VisionObjective(model, heads), model, processor, None)


def _load(recipe: Recipe) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """Load the model to start from; the recipe has made sure that it names one."""
    dtype = getattr(torch, recipe.init_dtype)
    model, processor = checkpoints.load_with_processor(
        cast(str, recipe.init), dtype=dtype, vision_tower=recipe.vision_tower
    )
    return cast(LlavaForConditionalGeneration, model), cast(LlavaProcessor, processor)


def _detached(model: LlavaForConditionalGeneration) -> dict[str, Tensor] | None:
    """Take off the sparsifier that a model came with; return its weights."""
    sparsifier = cast(Sparsifier | None, getattr(model, "sparsifier", None))
    if sparsifier is None:
        return None
    sparsifier.detach()
    return sparsifier.state_dict()


def _take_over(sparsifier: Sparsifier, trained: dict[str, Tensor], recipe: Recipe) -> None:
    """Go on from predictors that were trained before."""
    try:
        sparsifier.load_state_dict(trained)
    except RuntimeError as error:
        raise ValueError(
            f"{recipe.init}: init has predictors of another shape than sparsity asks for: give the d_model, "
            "nhead, dim_feedforward and num_layers of its sparsifier_config.json"
        ) from error


def _adapt(model: LlavaForConditionalGeneration, recipe: Recipe) -> Any:
    """Freeze what the recipe does not train; return peft's wrapper of ``model`` where it adds adapters."""
    if recipe.train == "full":
        return None
    model.requires_grad_(False)
    if recipe.train == "predictors":
        return None
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=recipe.lora_rank, lora_alpha=2 * recipe.lora_rank, target_modules=LORA_TARGETS)
    return get_peft_model(cast(Any, model), config)
