"""Recipes: one commented YAML file describes one training stage."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from dynamic_llava.config import SparsityConfig

UnitRate = Field(gt=0, le=1)


class Conversations(BaseModel):
    """Conversations in LLaVA's layout."""

    model_config = ConfigDict(extra="forbid")

    path: Path
    """JSON or JSONL file."""
    images: Path | None = None
    """Folder that the entries' pictures are relative to."""
    answers: Literal["last", "all"] = "last"
    """Whose tokens may be dropped: those of the last answer (as in the paper) or of all."""
    max_length: int = Field(default=2048, gt=0)
    on_error: Literal["raise", "skip"] = "raise"
    """What a broken sample or picture does: stop with its id, or be counted and left out."""
    limit: int | None = Field(default=None, gt=0)
    """Use only the first entries."""


class Evaluation(BaseModel):
    """Evaluation during training, by the loss under hard decisions; the best checkpoint is what is saved."""

    model_config = ConfigDict(extra="forbid")

    every: int = Field(gt=0)
    """Steps between evaluations; a multiple of ``save_every``."""
    steps: int = Field(default=8, gt=0)
    """For drawn data: steps' worth of unseen pictures."""
    data: Conversations | None = None


class Recipe(BaseModel):
    """One stage of training, as read from YAML. Unknown keys are refused."""

    model_config = ConfigDict(extra="forbid")

    stage: Literal["vision", "dense", "dynamic"]
    output: Path
    """Folder for the checkpoints, the log and, in ``model/``, the finished model."""
    init: str | None = None
    """Folder or hub id of the model, with predictors or without, to start from; none for the first stage."""
    vision_tower: str | None = None
    """Folder or hub id of the tower, where ``init`` is in LLaVA's own layout, which does not hold it."""
    init_dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    """What the weights are trained in."""
    seed: int = 0
    steps: int | None = Field(default=None, gt=0)
    """Optimizer steps; with ``data``, ``epochs`` may say it instead."""
    epochs: float = Field(default=1.0, gt=0)
    data: Conversations | None = None
    """What to train on; without it, pictures that are drawn as they are needed."""
    batch_size: int = Field(default=1, gt=0)
    """Conversations that one process computes at once."""
    accumulate: int = Field(default=1, gt=0)
    """Batches whose gradients make one optimizer step."""
    workers: int = Field(default=0, ge=0)
    """Processes that load data."""
    gradient_checkpointing: bool = False
    """Compute the layers again in the backward pass: a third slower, a fraction of the memory."""
    report_to: list[Literal["tensorboard", "wandb", "trackio"]] = Field(default_factory=list)
    evaluation: Evaluation | None = None
    scenes_per_step: int = Field(default=0, ge=0)
    easy_vqa_per_step: int = Field(default=0, ge=0)
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
    train_projector: bool = True
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
    merge_lora: bool = True
    """Add the adapters to the weights when saving; False writes them to ``lora/`` beside it instead."""
    distill_weight: float = Field(default=0.0, ge=0, le=1)
    """Share of the dynamic stage's loss that pulls the logits to those of the dense model it starts from."""
    image_rates: tuple[float, float] | None = None
    text_rates: tuple[float, float] | None = None
    """Both set: steps draw their keep rates between these bounds, and need no ratio loss."""
    drawn_share: float = Field(default=1.0, ge=0, le=1)
    """Share of the steps that draw; the others aim at the rates of ``sparsity``, by the ratio loss."""
    log_every: int = Field(default=1, gt=0)
    save_every: int = Field(default=100, gt=0)
    keep_checkpoints: int = Field(default=2, ge=2)
    """At least 2: the one before the last is good should the last be cut off while it is written."""
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
        for problem in recipe._problems():
            raise ValueError(f"{path}: {problem}")
        return recipe

    def _problems(self) -> Iterator[str]:
        """Yield what is wrong beyond single fields."""
        if self.stage == "dynamic" and self.sparsity is None:
            yield "sparsity: the dynamic stage needs it"
        try:
            config = SparsityConfig.from_dict(self.sparsity or {})
        except (ValueError, TypeError) as error:
            yield f"sparsity: {error}"
            return
        if config.sparsify_prompt:
            yield "sparsity: sparsify_prompt cannot be trained by a recipe; leave it out"
        if self.stage != "vision" and self.init is None:
            yield f"init: the {self.stage} stage starts from a finished stage; name its folder"
        rates = (self.image_rates, self.text_rates)
        if (rates[0] is None) != (rates[1] is None):
            yield "image_rates and text_rates are set together or not at all"
        if rates[0] and rates[1] and not all(0 < low <= high < 1 for low, high in (rates[0], rates[1])):
            yield "image_rates, text_rates: bounds must rise and lie between 0 and 1"
        drawn = self.scenes_per_step + self.easy_vqa_per_step
        if self.data is None and drawn == 0:
            yield "no data: give data, or scenes_per_step and easy_vqa_per_step; nothing to train on"
        if self.data is not None and (drawn or self.stage == "vision"):
            yield "data: the vision stage and steps with drawn pictures do not read conversations"
        if self.data is None and self.steps is None:
            yield "steps: drawn pictures never end; say how many steps to train"
        if self.data is None and (self.batch_size, self.accumulate) != (1, 1):
            yield "batch_size, accumulate: only for data; drawn pictures are counted by step"
        if self.evaluation and self.evaluation.every % self.save_every:
            yield "evaluation.every must be a multiple of save_every, for the best checkpoint is kept"
        if self.evaluation and (self.evaluation.data is None) != (self.data is None):
            yield "evaluation: give evaluation.data where there is data, and only there"
