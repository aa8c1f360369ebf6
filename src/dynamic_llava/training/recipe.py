"""Recipes: one commented YAML file describes one training stage."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from dynamic_llava.config import SparsityConfig

UnitRate = Field(gt=0, le=1)


class Recipe(BaseModel):
    """One stage of training, as read from YAML. Unknown keys are refused."""

    model_config = ConfigDict(extra="forbid")

    stage: Literal["vision", "dense", "dynamic"]
    output: Path
    """Folder for the checkpoint, the log and, in ``model/``, the finished model."""
    init: Path | None = None
    """Folder of the model to start from; none for the first stage."""
    seed: int = 0
    steps: int = Field(gt=0)
    scenes_per_step: int = Field(ge=0)
    easy_vqa_per_step: int = Field(ge=0)
    question_rounds: int = Field(default=1, gt=0)
    """How often every kind of question is asked about a scene."""
    place_rounds: int = Field(default=0, ge=0)
    """How often those that ask for a place (position, relation) are asked on top."""
    learning_rate: float = Field(gt=0)
    """Peak rate of the model's parameters; warm-up, then cosine to zero."""
    matrix_learning_rate: float = Field(default=2e-3, gt=0)
    """Peak rate of the matrices that Muon trains, on AdamW's scale (match_rms_adamw)."""
    predictor_learning_rate: float = Field(default=1e-3, gt=0)
    warmup: float = Field(default=0.03, ge=0, lt=1)
    """Share of the steps that warm up."""
    weight_decay: float = Field(default=0.0, ge=0)
    optimizer: Literal["adamw", "muon"] = "adamw"
    """muon: Muon for the hidden matrices, AdamW for everything else."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """bfloat16: matrix products under autocast, weights stay float32; faster where the hardware has it."""
    train_vision_tower: bool = False
    short_answer_weight: float = Field(default=1.0, gt=0)
    clip_norm: float = Field(default=1.0, gt=0)
    tau_start: float = Field(default=1.0, gt=0)
    tau_end: float = Field(default=0.1, gt=0)
    calibration_steps: int = Field(default=16, ge=0)
    """Steps' worth of unseen data on which the dynamic stage sets the output predictor's threshold."""
    sparsity: dict[str, Any] | None = None
    """Arguments of SparsityConfig; needed by the dynamic stage."""
    train: Literal["full", "predictors", "lora"] = "full"
    """What the dynamic stage trains beside the predictors: the model, nothing, or LoRA adapters."""
    lora_rank: int = Field(default=16, gt=0)
    distill_weight: float = Field(default=0.0, ge=0, le=1)
    """Share of the dynamic stage's loss that pulls the logits to those of the dense model it starts from."""
    image_rates: tuple[float, float] | None = None
    text_rates: tuple[float, float] | None = None
    """Both set: every step draws its keep rates between these bounds, and no ratio loss is needed."""
    save_every: int = Field(default=100, gt=0)
    save_dtype: Literal["float32", "float16", "bfloat16"] = "float32"

    @classmethod
    def read(cls, path: Path) -> Recipe:
        """Read and check a recipe.

        Raises
        ------
        FileNotFoundError
            If there is no such file.
        ValueError
            If the file is no YAML mapping, or a field is missing, unknown or out of range.
        """
        if not path.is_file():
            raise FileNotFoundError(f"{path}: no such recipe; the shipped ones are in recipes/")
        try:
            values = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise ValueError(f"{path}: not a YAML file: {str(error).splitlines()[0]}") from error
        if not isinstance(values, dict):
            raise ValueError(f"{path}: a recipe is a mapping of settings, found {type(values).__name__}")
        try:
            recipe = cls(**values)
        except ValidationError as error:
            first = error.errors()[0]
            field = ".".join(str(part) for part in first["loc"])
            raise ValueError(f"{path}: {field}: {first['msg']}") from None
        if recipe.stage == "dynamic" and recipe.sparsity is None:
            raise ValueError(f"{path}: sparsity: the dynamic stage needs it")
        try:
            SparsityConfig.from_dict(recipe.sparsity or {})
        except (ValueError, TypeError) as error:
            raise ValueError(f"{path}: sparsity: {error}") from error
        if recipe.stage != "vision" and recipe.init is None:
            raise ValueError(
                f"{path}: init: the {recipe.stage} stage starts from a finished stage; name its folder"
            )
        rates = (recipe.image_rates, recipe.text_rates)
        if (rates[0] is None) != (rates[1] is None):
            raise ValueError(f"{path}: image_rates and text_rates are set together or not at all")
        if rates[0] and rates[1] and not all(0 < low <= high < 1 for low, high in (rates[0], rates[1])):
            raise ValueError(f"{path}: image_rates, text_rates: bounds must rise and lie between 0 and 1")
        if recipe.scenes_per_step + recipe.easy_vqa_per_step == 0:
            raise ValueError(f"{path}: scenes_per_step and easy_vqa_per_step are both 0; nothing to train on")
        return recipe
