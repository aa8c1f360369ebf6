"""The three stages: what each trains, and the loss of one step."""

from __future__ import annotations

import copy
import random
from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlavaForConditionalGeneration, LlavaProcessor

from dynamic_llava import checkpoints
from dynamic_llava.config import SparsityConfig
from dynamic_llava.policies import TrainRates
from dynamic_llava.report import Report
from dynamic_llava.sparsifier import Sparsifier
from dynamic_llava.training import nano, vision
from dynamic_llava.training.calibration import set_text_threshold
from dynamic_llava.training.packing import IGNORE, Batch, Packer, model_inputs
from dynamic_llava.training.recipe import Recipe
from dynamic_llava.training.stream import Stream

Metrics = dict[str, float]


class Stage(ABC):
    """What a training loop needs of a stage.

    Attributes
    ----------
    model, processor
        What is trained and saved.
    modules
        Everything whose state a checkpoint must hold.
    """

    def __init__(
        self, recipe: Recipe, model: LlavaForConditionalGeneration, processor: LlavaProcessor
    ) -> None:
        self.recipe = recipe
        self.model = model
        self.processor = processor
        self.stream = Stream(
            recipe.scenes_per_step,
            recipe.easy_vqa_per_step,
            recipe.question_rounds,
            recipe.place_rounds,
            recipe.seed,
        )
        self.modules: dict[str, nn.Module] = {"model": model}

    def autocast(self) -> torch.autocast:
        """Context of the forward passes: matrix products in the recipe's precision, weights in float32."""
        dtype = getattr(torch, self.recipe.precision)
        return torch.autocast(self.model.device.type, dtype=dtype, enabled=dtype != torch.float32)

    @abstractmethod
    def backward(self, step: int) -> Metrics:
        """Accumulate the gradients of one step; return what the log shows."""

    def parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Named trainable parameters; names that start with ``sparsifier.`` get the predictors' rate."""
        for module in self.modules.values():
            yield from ((name, p) for name, p in module.named_parameters() if p.requires_grad)

    def save(self, folder: Path) -> None:
        """Write the finished model: stock checkpoint, processor, and predictors where there are some."""
        self.model.to(getattr(torch, self.recipe.save_dtype))
        checkpoints.save(self.model, self.processor, folder)


class VisionStage(Stage):
    """The tower learns to name what covers each patch; the rest of the model is still untouched."""

    def __init__(self, recipe: Recipe) -> None:
        processor = nano.build_processor()
        super().__init__(recipe, nano.build_model(processor, recipe.seed), processor)
        self.model.requires_grad_(False)
        self.model.model.vision_tower.requires_grad_(True)
        features = self.model.model.multi_modal_projector.linear_1.in_features
        self.heads = vision.PatchHeads(features, side=nano.IMAGE_SIDE // nano.PATCH_SIDE)
        self.modules["heads"] = self.heads

    def backward(self, step: int) -> Metrics:
        """Name every patch of the step's pictures."""
        batches = []
        if indices := self.stream.scenes(step):
            batches.append(vision.scene_batch(indices, self.processor))
        if samples := self.stream.easy_vqa(step):
            batches.append(vision.easy_vqa_batch(samples, self.processor))
        pixel_values, labels_BIA = (torch.cat(parts) for parts in zip(*batches, strict=True))
        with self.autocast():
            logits = self.heads(vision.patch_features(self.model, pixel_values))
        loss = vision.loss(logits, labels_BIA)
        loss.backward()
        return {"loss": loss.item(), "accuracy": vision.accuracy(logits, labels_BIA)}


class DenseStage(Stage):
    """Visual instruction tuning of projector and decoder on packed turns, nothing sparse."""

    def __init__(self, recipe: Recipe) -> None:
        model, processor = _load(recipe)
        super().__init__(recipe, model, processor)
        self.packer = Packer(processor, recipe.short_answer_weight)
        self.model.model.vision_tower.requires_grad_(recipe.train_vision_tower)
        self.model.train()

    def backward(self, step: int) -> Metrics:
        """Predict every answer of the step's rows."""
        batches = [self.packer(group) for group in self.stream.groups(step)]
        total_weight = sum(_label_weight(batch) for batch in batches)
        metrics: Metrics = {"loss": 0.0}
        for batch in batches:
            with self.autocast():
                output = self.model(**model_inputs(batch))
            loss = _weighted_loss(output.logits, batch) / total_weight
            loss.backward()
            metrics["loss"] += loss.item()
        return metrics


class DynamicStage(Stage):
    """The paper's stage: predictors and model together, Gumbel masks, ratio losses (paper eq. 8 to 11)."""

    def __init__(self, recipe: Recipe) -> None:
        model, processor = _load(recipe)
        super().__init__(recipe, model, processor)
        self.packer = Packer(processor, recipe.short_answer_weight)
        torch.manual_seed(recipe.seed)
        hidden_size = cast(nn.Embedding, model.get_input_embeddings()).embedding_dim
        self.sparsifier = Sparsifier(SparsityConfig.from_dict(recipe.sparsity or {}), hidden_size)
        model.model.vision_tower.requires_grad_(recipe.train_vision_tower)
        self.teacher = copy.deepcopy(model).eval().requires_grad_(False) if recipe.distill_weight else None
        self.adapted = _adapt(model, recipe)
        self.sparsifier.attach(model)
        model.train()

    def backward(self, step: int) -> Metrics:
        """Predict every answer from what the masks leave, and pull the keep rates to their targets."""
        recipe = self.recipe
        self.sparsifier.tau = recipe.tau_start * (recipe.tau_end / recipe.tau_start) ** (step / recipe.steps)
        if recipe.image_rates and recipe.text_rates:
            draw = random.Random(f"rates-{recipe.seed}-{step}").uniform
            self.sparsifier.train_rates = TrainRates(draw(*recipe.image_rates), draw(*recipe.text_rates))
        batches = [self.packer(group) for group in self.stream.groups(step)]
        total_weight = sum(_label_weight(batch) for batch in batches)
        total_rows = sum(len(batch.input_ids_BN) for batch in batches)
        metrics: Metrics = {"loss": 0.0, "ratio_loss": 0.0}
        kept: dict[str, list[Tensor]] = {"image_kept": [], "text_kept": []}
        for batch in batches:
            with self.autocast():
                output = self.model(**model_inputs(batch), answer_mask=batch.answer_mask_BN)
            loss = self._answer_loss(output.logits, batch) / total_weight
            ratio = torch.stack(self.sparsifier.ratio_loss()).sum() * len(batch.input_ids_BN) / total_rows
            is_exact = self.sparsifier.train_rates is not None
            weight = 0.0 if is_exact else self.sparsifier.config.ratio_weight
            (loss + weight * ratio).backward()
            metrics["loss"] += loss.item()
            metrics["ratio_loss"] += ratio.item()
            report = cast(Report, self.sparsifier.report)
            kept["image_kept"].append(cast(Tensor, report.image_mask_BI).detach().flatten())
            if batch.answer_mask_BN.any():
                kept["text_kept"].append(cast(Tensor, report.text_mask_BN).detach()[batch.answer_mask_BN])
        metrics |= {name: torch.cat(masks).mean().item() for name, masks in kept.items() if masks}
        return metrics | {"tau": self.sparsifier.tau}

    def _answer_loss(self, logits_BNV: Tensor, batch: Batch) -> Tensor:
        """Cross-entropy, mixed with the divergence from the dense model's distribution where one teaches."""
        loss, share = _weighted_loss(logits_BNV, batch), self.recipe.distill_weight
        if self.teacher is None:
            return loss
        with torch.no_grad(), self.autocast():
            target_BNV = self.teacher(**model_inputs(batch)).logits
        return (1 - share) * loss + share * _divergence(logits_BNV, target_BNV, batch)

    def save(self, folder: Path) -> None:
        """Set the threshold of the output predictor, then write the finished model."""
        steps = range(self.recipe.steps, self.recipe.steps + self.recipe.calibration_steps)
        batches = (self.packer(group) for step in steps for group in self.stream.groups(step))
        long = [batch for batch in batches if batch.answer_mask_BN.any()]
        config = self.sparsifier.config
        if long and config.sparsify_text and config.text_policy == "learned":
            set_text_threshold(self.model, self.sparsifier, long)
        if self.adapted is not None:
            self.sparsifier.detach()
            self.adapted.merge_and_unload()
            self.sparsifier.attach(self.model)
        super().save(folder)


STAGES: dict[str, type[VisionStage] | type[DenseStage] | type[DynamicStage]] = {
    "vision": VisionStage,
    "dense": DenseStage,
    "dynamic": DynamicStage,
}


def _load(recipe: Recipe) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """Load the model to start from; the recipe has made sure that it names one."""
    model, processor = checkpoints.load(cast(Path, recipe.init), dtype=torch.float32)
    if hasattr(model, "sparsifier"):
        raise ValueError(f"{recipe.init}: init has a sparsifier already; start from the dense stage's model")
    return cast(LlavaForConditionalGeneration, model), cast(LlavaProcessor, processor)


def _adapt(model: LlavaForConditionalGeneration, recipe: Recipe) -> Any:
    """Freeze what the recipe does not train; return peft's wrapper of ``model`` where it adds adapters."""
    if recipe.train == "full":
        return None
    model.requires_grad_(False)
    if recipe.train == "predictors":
        return None
    from peft import LoraConfig, get_peft_model

    targets = r".*language_model.*\.(q|k|v|o|gate|up|down)_proj"
    config = LoraConfig(r=recipe.lora_rank, lora_alpha=2 * recipe.lora_rank, target_modules=targets)
    return get_peft_model(cast(Any, model), config)


def _divergence(logits_BNV: Tensor, target_BNV: Tensor, batch: Batch) -> Tensor:
    """Kullback-Leibler divergence from the teacher's next-token distribution, weighted like the loss."""
    labelled_BN = batch.labels_BN[:, 1:] != IGNORE
    student, teacher = (x[:, :-1][labelled_BN].float().log_softmax(-1) for x in (logits_BNV, target_BNV))
    losses = (teacher.exp() * (teacher - student)).sum(-1)
    return (losses * batch.weights_BN[:, 1:][labelled_BN]).sum()


def _label_weight(batch: Batch) -> float:
    return batch.weights_BN[batch.labels_BN != IGNORE].sum().item()


def _weighted_loss(logits_BNV: Tensor, batch: Batch) -> Tensor:
    """Cross-entropy of the next token, summed with each label's weight."""
    labels_BN = batch.labels_BN[:, 1:]
    labelled_BN = labels_BN != IGNORE
    logits_AV = logits_BNV[:, :-1][labelled_BN].float()
    losses = F.cross_entropy(logits_AV, labels_BN[labelled_BN], reduction="none")
    return (losses * batch.weights_BN[:, 1:][labelled_BN]).sum()
