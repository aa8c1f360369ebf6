"""Recipes: one commented YAML file describes one training stage, in a section for each concern."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from dynamic_llava.config import SparsityConfig
from dynamic_llava.files import first_line, one_line

DType = Literal["float32", "float16", "bfloat16"]
CALIBRATION_STEPS = 16


class Section(BaseModel):
    """A part of a recipe. Unknown keys are refused, and numbers that are infinite or none."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    @field_validator("*")
    @classmethod
    def _no_null(cls, value: Any) -> Any:
        if isinstance(value, str | Path) and "\0" in str(value):
            raise ValueError("holds a null character, which no name of a file has")
        return value


class StageSettings(Section):
    """Which stage it is, and the model that it starts from."""

    name: Literal["vision", "align", "dense", "dynamic"]
    """vision: train a tower; align: the projector, to words; dense: the model; dynamic: what drops tokens."""
    init: str | None = None
    """Folder or hub id of the model, with predictors or without, to start from; none for the first stage."""
    init_dtype: DType = "float32"
    """What the weights are trained in."""
    vision_tower: str | None = None
    """Folder or hub id of the tower, where ``init`` is in LLaVA's own layout, which does not hold it."""
    train_vision_tower: bool = False
    """Whether the tower learns too."""
    train_projector: bool = True
    """Whether the projector between tower and decoder learns too."""
    train_embeddings: bool = True
    """Whether the embeddings learn too, and the output layer where it shares them."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.name != "vision" and self.init is None:
            raise ValueError(f"the {self.name} stage starts from a finished stage; name its folder in init")
        return self


class Conversations(Section):
    """Conversations in LLaVA's layout."""

    path: Path
    """JSON or JSONL file."""
    images: Path | None = None
    """Folder that the entries' pictures are relative to."""
    answers: Literal["last", "all"] = "last"
    """Whose tokens may be dropped: those of the last answer (as in the paper) or of all."""
    max_length: int = Field(default=2048, gt=0)
    """Tokens of the longest entry, image tokens included; a longer one loses its end."""
    on_error: Literal["raise", "skip"] = "raise"
    """What a broken sample or picture does: stop with its id, or be counted and left out."""
    limit: int | None = Field(default=None, gt=0)
    """Use only the first entries."""


class Drawn(Section):
    """Pictures that are drawn as they are needed, a number for each step; nano learns from these."""

    scenes_per_step: int = Field(default=0, ge=0)
    """Scenes drawn for each step."""
    easy_vqa_per_step: int = Field(default=0, ge=0)
    """Pictures of easy-VQA taken for each step."""
    question_rounds: int = Field(default=1, gt=0)
    """How often every kind of question is asked about a scene."""
    place_rounds: int = Field(default=0, ge=0)
    """How often those that ask for a place (position, relation) are asked on top."""
    short_answer_weight: float = Field(default=1.0, gt=0)
    """Weight in the loss of a token of a short answer; those of a description weigh 1."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.scenes_per_step + self.easy_vqa_per_step == 0:
            raise ValueError("scenes_per_step and easy_vqa_per_step are 0; there is nothing to train on")
        return self


class Photographs(Section):
    """Photographs with captions or questions, a number for each step; ``photo`` learns from these."""

    captions: Path
    """JSONL file in Flickr8k's layout, pictures beside it; its split ``train`` is trained on."""
    questions: Path | None = None
    """JSONL file in DAQUAR's layout."""
    texts: Path | None = None
    """Conversations without pictures, in LLaVA's layout, so that the language stays."""
    features: Path
    """Folder that keeps what the frozen tower says about every picture; filled at first use."""
    image_tokens: int = Field(default=256, gt=0)
    """Of a picture; fewer are averages of neighbours, for cheap first rounds."""
    captions_per_step: int = Field(default=0, ge=0)
    """Pictures with all their captions, each an answer of its own."""
    descriptions_per_step: int = Field(default=0, ge=0)
    """Pictures with all their captions as one long answer."""
    questions_per_step: int = Field(default=0, ge=0)
    """Pictures with up to three of their questions."""
    texts_per_step: int = Field(default=0, ge=0)
    """Conversations of ``texts``."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.captions_per_step + self.descriptions_per_step == 0:
            raise ValueError("captions_per_step and descriptions_per_step are 0; give one of them a number")
        for name in ("questions", "texts"):
            if getattr(self, f"{name}_per_step") and getattr(self, name) is None:
                raise ValueError(f"{name}_per_step is above 0, so give {name}, a file")
        return self


class DataSettings(Section):
    """What is trained on: conversations, drawn pictures, or photographs."""

    conversations: Conversations | None = None
    """Conversations in a file."""
    drawn: Drawn | None = None
    """Pictures that are drawn, instead."""
    photographs: Photographs | None = None
    """Photographs, instead."""
    batch_size: int = Field(default=1, gt=0)
    """Conversations that one process computes at once."""
    accumulate: int = Field(default=1, gt=0)
    """Batches whose gradients make one optimizer step."""
    workers: int = Field(default=0, ge=0)
    """Processes that load data."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        kinds = ("conversations", "drawn", "photographs")
        found = [name for name in kinds if getattr(self, name) is not None]
        if len(found) != 1:
            several = f"found both {' and '.join(found)}" if found else "there is nothing to train on"
            raise ValueError(f"give one of {', '.join(kinds)}; {several}")
        if self.conversations is None and (self.batch_size, self.accumulate) != (1, 1):
            raise ValueError(
                f"batch_size and accumulate are for conversations; {found[0]} counts pictures by step"
            )
        return self


class OptimizerSettings(Section):
    """How the weights move."""

    name: Literal["adamw", "muon"] = "adamw"
    """muon: Muon for the hidden matrices, AdamW for everything else."""
    learning_rate: float = Field(gt=0)
    """Peak rate of the model's parameters; warm-up, then cosine to zero."""
    matrix_learning_rate: float = Field(default=2e-3, gt=0)
    """Peak rate of the matrices that Muon trains, on AdamW's scale (match_rms_adamw)."""
    predictor_learning_rate: float = Field(default=1e-3, gt=0)
    """Peak rate of the predictors."""
    warmup: float = Field(default=0.03, ge=0, lt=1)
    """Share of the steps that warm up."""
    weight_decay: float = Field(default=0.0, ge=0)
    """Decoupled weight decay, of AdamW and of Muon."""
    clip_norm: float = Field(default=1.0, gt=0)
    """Longest gradient, over all parameters; a longer one is scaled down."""


class MethodSettings(Section):
    """How the dynamic stage learns what to drop."""

    sparsity: dict[str, Any]
    """Arguments of SparsityConfig."""
    train: Literal["full", "predictors", "lora"] = "full"
    """What is trained beside the predictors: the model, nothing, or LoRA adapters."""
    lora_rank: int = Field(default=16, gt=0)
    """Rank of the adapters."""
    merge_lora: bool = True
    """Add the adapters to the weights when saving; False writes them to ``lora/`` beside it instead."""
    tau_start: float = Field(default=1.0, gt=0)
    """Temperature of the Gumbel softmax at the first step, from which it falls to ``tau_end``."""
    tau_end: float = Field(default=0.1, gt=0)
    """Temperature of the Gumbel softmax at the last step."""
    image_rates: tuple[float, float] | None = None
    """Lowest and highest share of image tokens to keep: each step draws one, and needs no ratio loss."""
    text_rates: tuple[float, float] | None = None
    """The same for output tokens; set both, or neither."""
    drawn_share: float = Field(default=1.0, ge=0, le=1)
    """Share of the steps that draw; the others aim at the rates of ``sparsity``, by the ratio loss."""
    distill_weight: float = Field(default=0.0, ge=0, le=1)
    """Share of the loss that pulls the logits to those of the dense model it starts from."""
    calibration_steps: int = Field(default=CALIBRATION_STEPS, ge=0)
    """Steps' worth of unseen data on which the output predictor's threshold is set at the end."""

    @property
    def changes_model(self) -> bool:
        """Whether the finished model is another one than it starts from, predictors aside."""
        return self.train == "full" or (self.train == "lora" and self.merge_lora)

    @model_validator(mode="after")
    def _check(self) -> Self:
        try:
            config = SparsityConfig.from_dict(self.sparsity)
        except (ValueError, TypeError) as error:
            raise ValueError(f"sparsity: {error}") from error
        if config.sparsify_prompt:
            raise ValueError("sparsity: sparsify_prompt cannot be trained by a recipe; leave it out")
        if (self.image_rates is None) != (self.text_rates is None):
            raise ValueError("image_rates and text_rates are set together or not at all")
        bounds = [rates for rates in (self.image_rates, self.text_rates) if rates is not None]
        if not all(0 < low <= high < 1 for low, high in bounds):
            raise ValueError("image_rates, text_rates: bounds must rise and lie between 0 and 1")
        return self


class RunSettings(Section):
    """How long, how exactly and where to; what is kept on the way."""

    output: Path
    """Folder for the checkpoints, the log and, in ``model/``, the finished model."""
    seed: int = Field(default=0, ge=0, lt=2**32)
    """Seed of the order of the data, of drawn pictures, of new weights and of the noise."""
    steps: int | None = Field(default=None, gt=0)
    """Optimizer steps; with conversations, ``epochs`` may say it instead."""
    epochs: float = Field(default=1.0, gt=0)
    """How often the conversations are gone through, where ``steps`` does not say it."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """bfloat16: matrix products under autocast, weights stay float32; faster where the hardware has it."""
    attention: Literal["sdpa", "eager"] = "sdpa"
    """eager: faster for packed rows on a CPU, whose sdpa is slow in the backward pass; dense stages only."""
    gradient_checkpointing: bool = False
    """Compute the layers again in the backward pass: a third slower, a fraction of the memory."""
    log_every: int = Field(default=1, gt=0)
    """Steps between two lines of the log."""
    report_to: list[Literal["tensorboard", "wandb", "trackio"]] = Field(default_factory=list)
    """Trackers that get what the log gets."""
    save_every: int = Field(default=100, gt=0)
    """Steps between two checkpoints."""
    keep_checkpoints: int = Field(default=2, ge=2)
    """At least 2: the one before the last is good should the last be cut off while it is written."""
    save_dtype: DType = "float32"
    """What the weights of the finished model are written in."""
    license: str | None = None
    """Of the trained weights, as the hub names it (``apache-2.0``, ``llama2``); for the model card."""


class EvaluationSettings(Section):
    """Evaluation during training, by the loss under hard decisions; the best checkpoint is what is saved."""

    every: int = Field(gt=0)
    """Steps between evaluations; a multiple of ``run.save_every``."""
    steps: int = Field(default=8, gt=0)
    """For drawn data: steps' worth of unseen pictures."""
    conversations: Conversations | None = None
    """Conversations in a file that are not trained on."""


class Recipe(Section):
    """One stage of training, as read from YAML. Each section checks itself; here is what spans two."""

    stage: StageSettings
    """Which stage it is, and the model that it starts from."""
    data: DataSettings
    """What it is trained on."""
    optimizer: OptimizerSettings
    """How the weights move."""
    method: MethodSettings | None = None
    """Needed by the dynamic stage, and only there."""
    run: RunSettings
    """How long, how exactly and where to."""
    evaluation: EvaluationSettings | None = None
    """Whether it is evaluated on the way; left out, it is not."""

    @property
    def calibration_steps(self) -> int:
        """Steps' worth of drawn pictures that lie between those of training and those of evaluation."""
        return self.method.calibration_steps if self.method else CALIBRATION_STEPS

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
        if path.is_dir():
            raise ValueError(f"{path}: is not a file but a folder; give the path of a recipe")
        if not path.is_file():
            raise FileNotFoundError(f"{path}: no such recipe; dynamic-llava recipes lists the bundled ones")
        try:
            values = yaml.safe_load(path.read_text(encoding="utf-8"))
        except Exception as error:  # values of odd types raise anything in PyYAML
            raise ValueError(f"{path}: not a YAML file: {first_line(error)}") from error
        if not isinstance(values, dict):
            raise ValueError(f"{path}: a recipe is a mapping of settings, found {type(values).__name__}")
        if moves := _moves(values):
            raise ValueError(f"{path}: settings lie in sections now: move {moves}")
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            raise ValueError(f"{path}: {_reason(error)}") from None

    @model_validator(mode="after")
    def _check(self) -> Self:
        for problem in (self._method(), self._data(), self._attention(), self._evaluation()):
            if problem is not None:
                raise ValueError(problem)
        return self

    def _method(self) -> str | None:
        if (self.method is not None) == (self.stage.name == "dynamic"):
            return None
        if self.method is None:
            return "method: the dynamic stage needs it, with sparsity"
        return f"method: the {self.stage.name} stage drops nothing; leave it out"

    def _data(self) -> str | None:
        for stage, kind in (("vision", "drawn"), ("align", "photographs")):
            if self.stage.name == stage and getattr(self.data, kind) is None:
                return f"data: the {stage} stage does not read anything else; give {kind}"
        if self.data.conversations is None and self.run.steps is None:
            return "run.steps: drawn pictures never end; say how many steps to train"
        return None

    def _attention(self) -> str | None:
        if self.run.attention == "eager" and self.stage.name == "dynamic":
            return "run.attention: the dynamic stage has an attention of its own; leave it out"
        return None

    def _evaluation(self) -> str | None:
        if self.evaluation is None:
            return None
        if self.evaluation.every % self.run.save_every:
            return "evaluation.every must be a multiple of run.save_every, for the best checkpoint is kept"
        if (self.evaluation.conversations is None) != (self.data.conversations is None):
            return (
                "evaluation: give evaluation.conversations where there are data.conversations, and only there"
            )
        return None


# Where the settings of recipes without sections went.
RENAMED = {"stage": "stage.name", "data": "data.conversations", "optimizer": "optimizer.name"}
SECTIONS = {
    "stage": ("init", "init_dtype", "vision_tower", "train_vision_tower", "train_projector"),
    "data": ("batch_size", "accumulate", "workers"),
    "data.drawn": (
        "scenes_per_step", "easy_vqa_per_step", "question_rounds", "place_rounds", "short_answer_weight",
    ),
    "optimizer": (
        "learning_rate", "matrix_learning_rate", "predictor_learning_rate", "warmup", "weight_decay",
        "clip_norm",
    ),
    "method": (
        "sparsity", "train", "lora_rank", "merge_lora", "tau_start", "tau_end", "image_rates", "text_rates",
        "drawn_share", "distill_weight", "calibration_steps",
    ),
    "run": (
        "output", "seed", "steps", "epochs", "precision", "gradient_checkpointing", "log_every", "report_to",
        "save_every", "keep_checkpoints", "save_dtype",
    ),
}  # fmt: skip
MOVED = RENAMED | {name: f"{section}.{name}" for section, names in SECTIONS.items() for name in names}


def _moves(values: dict[str, Any]) -> str:
    """Say where what stands outside of its section belongs; empty for a recipe in sections."""
    moves: dict[str, list[str]] = {}
    for name, place in MOVED.items():
        if name in values and not _is_section(name, values[name]):
            section, _, new = place.rpartition(".")
            moves.setdefault(section, []).append(name if new == name else f"{name} (as {new})")
    evaluation = values.get("evaluation")
    if isinstance(evaluation, dict) and "data" in evaluation:
        moves["evaluation"] = ["evaluation.data (as conversations)"]
    return "; ".join(f"{', '.join(names)} into {section}" for section, names in moves.items())


def _is_section(name: str, value: Any) -> bool:
    return name in RENAMED and isinstance(value, dict) and "path" not in value


def _reason(error: ValidationError) -> str:
    """Return the first of the problems, with the place of its field."""
    first = error.errors()[0]
    place = ".".join(str(part) for part in first["loc"])
    reason = str(first["ctx"]["error"]) if first["type"] == "value_error" else first["msg"]
    return one_line(f"{place}: {reason}" if place else reason)
