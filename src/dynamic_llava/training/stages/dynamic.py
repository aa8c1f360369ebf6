"""The dynamic stage: the paper's sparse training, with Gumbel masks, masked softmax and ratio losses.

Legend: B rows, N tokens, A labelled tokens, V vocabulary.
"""

from __future__ import annotations

import copy
import random
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from dynamic_llava import checkpoints
from dynamic_llava.config import SparsityConfig
from dynamic_llava.core.decisions import same_size
from dynamic_llava.core.report import Report
from dynamic_llava.core.sampled import Sampled
from dynamic_llava.data.training import model_inputs
from dynamic_llava.families import family_of
from dynamic_llava.methods.base import TrainRates
from dynamic_llava.sparsifier import Sparsifier
from dynamic_llava.training.calibration import set_text_threshold
from dynamic_llava.training.noise import SampleNoise
from dynamic_llava.training.recipe import MethodSettings, Recipe
from dynamic_llava.training.stages.base import Load, Stage, load_init
from dynamic_llava.training.stages.dense import DenseObjective, cross_entropy
from dynamic_llava.training.stages.objective import Group, label_weights

LORA_TARGETS = r"\.layers\..*\.(q|k|v|o|gate|up|down)_proj"  # in the decoder


@dataclass(frozen=True)
class DynamicStage(Stage):
    """Trains predictors, and the model or adapters with them; ``adapted`` is peft's wrapper, or None."""

    adapted: Any = None

    @classmethod
    def build(cls, recipe: Recipe, load: Load) -> DynamicStage:
        """See the base class; goes on from the predictors that the model may have."""
        method = _method(recipe)
        model, processor, trained = load_init(recipe, load)
        teacher = copy.deepcopy(model) if method.distill_weight else None
        torch.manual_seed(recipe.run.seed)
        hidden_size = cast(nn.Embedding, model.get_input_embeddings()).embedding_dim
        sparsifier = Sparsifier(SparsityConfig.from_dict(method.sparsity), hidden_size)
        if trained is not None:
            _take_over(sparsifier, trained, recipe)
        adapted = _adapt(model, method)
        sparsifier.attach(model)
        sparsifier.float()  # beside 16-bit weights too, for their updates are small
        return cls(
            recipe, SparseObjective(model, method, recipe.run.seed, teacher), model, processor, adapted
        )

    def finish(self, unseen: Iterable[Mapping[str, Any]], folder: Path) -> None:
        """Set the output predictor's threshold on ``unseen`` and write the finished model.

        Where the model stayed as it was, the predictors alone are written, with its name.
        """
        model, method = self.model, _method(self.recipe)
        sparsifier = cast(Sparsifier, model.sparsifier)
        sparsifier.train_rates = None
        sparsifier.to(dtype=model.dtype)
        config = sparsifier.config
        if config.sparsify_text and sparsifier.text_method.has_dial:
            set_text_threshold(model, sparsifier, unseen)
        sparsifier.detach()  # peft takes its adapters out of the stock model
        if self.adapted is not None and method.merge_lora:
            self.adapted.merge_and_unload()
        elif self.adapted is not None:
            self.adapted.save_pretrained(folder.with_name("lora"))
            self.adapted.unload()
        sparsifier.attach(model)
        if method.changes_model:
            model.name_or_path = ""  # it is another model now
            super().finish(unseen, folder)
        else:
            sparsifier.to(dtype=getattr(torch, self.recipe.run.save_dtype))
            checkpoints.save_predictors(sparsifier, folder)


class SparseObjective(DenseObjective):
    """The paper's stage: Gumbel masks, masked softmax, ratio losses (paper eq. 8 to 11).

    Parameters
    ----------
    model
        With its sparsifier attached.
    method
        Schedules and weights.
    seed
        Of the noise, and of the rates where they are drawn.
    teacher
        Dense model whose distribution is learnt from, where ``method.distill_weight`` is above 0.
    """

    def __init__(
        self, model: PreTrainedModel, method: MethodSettings, seed: int, teacher: PreTrainedModel | None
    ) -> None:
        super().__init__(model)
        self.method = method
        self.seed = seed
        self.noise = self.sparsifier.noise = SampleNoise(seed)
        # In a list, it is no submodule: neither saved nor sharded nor put into training mode.
        self._teachers = [] if teacher is None else [DenseObjective(teacher.eval().requires_grad_(False))]

    @property
    def sparsifier(self) -> Sparsifier:
        """The model's."""
        return cast(Sparsifier, self.model.sparsifier)

    def begin_step(self, step: int, steps: int) -> None:
        """Set the temperature, the rates where they are drawn, and the noise."""
        method = self.method
        self.noise.step = step
        self.sparsifier.tau = method.tau_start * (method.tau_end / method.tau_start) ** (step / steps)
        if method.image_rates and method.text_rates:
            draw = random.Random(f"rates-{self.seed}-{step}")
            rates = TrainRates(draw.uniform(*method.image_rates), draw.uniform(*method.text_rates))
            self.sparsifier.train_rates = rates if draw.random() < method.drawn_share else None

    def forward(self, groups: Sequence[Group], totals: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """See the base class; in evaluation mode decisions are hard, and there is no penalty."""
        loss = penalty = totals.new_zeros(())
        sums: dict[str, list[Tensor]] = {"image_kept": [], "text_kept": []}
        for group in groups:
            if self.training:
                self._begin_noise(group)
            logits_AV = self.logits(group, answer_mask=group["answer_mask"])
            loss = loss + self._answer_loss(logits_AV, group) / totals[0]
            if self.training:
                penalty = penalty + self._penalty(group, totals)
            for name, kept in zip(sums, self._kept(group), strict=True):
                sums[name].append(kept)
        metrics = {name: torch.stack(parts).sum(0) for name, parts in sums.items()}
        if not self.training:
            return loss, metrics
        weight = 0.0 if self.sparsifier.train_rates is not None else self.sparsifier.config.ratio_weight
        steps = torch.ones_like(loss)
        metrics["answer_loss"] = torch.stack([loss.detach(), steps])
        metrics["ratio_loss"] = torch.stack([penalty.detach(), steps])
        return loss + weight * penalty, metrics

    def count_pictures(self, group: Group) -> int:
        """Count as the family does: what a keep rate holds for."""
        return len(self._pictures(group))

    def _pictures(self, group: Group) -> list[Tensor]:
        return family_of(self.model).pictures(self.model.base_model, model_inputs(group))

    def _begin_noise(self, group: Group) -> None:
        pictures, length = self._pictures(group), group["input_ids"].shape[1]
        sparsifier = self.sparsifier
        spans = int(sparsifier.config.sparsify_text and sparsifier.text_predictor is not None)
        row_K = [int(picture_I[0]) // length for picture_I in pictures]
        self.noise.begin(group["sample"].tolist(), row_K, spans, same_size(pictures))

    def _penalty(self, group: Group, totals: Tensor) -> Tensor:
        image, text, prompt = self.sparsifier.ratio_loss()
        pictures = len(cast(Sampled, self.sparsifier.sampled).pictures)
        rows = len(group["labels"])
        return image * pictures / totals[1].clamp(min=1) + (text + prompt) * rows / totals[2]

    def _answer_loss(self, logits_AV: Tensor, group: Group) -> Tensor:
        """Cross-entropy, mixed with the divergence from the teacher's distribution."""
        loss, share = cross_entropy(logits_AV, group), self.method.distill_weight
        for teacher in self._teachers:
            with torch.no_grad():
                target_AV = teacher.logits(group)
            loss = (1 - share) * loss + share * _divergence(logits_AV, target_AV, group)
        return loss

    def _kept(self, group: Group) -> tuple[Tensor, Tensor]:
        """Return kept and all tokens of both kinds, [2] each; short answers are not counted."""
        answer_BN, sampled = group["answer_mask"], self.sparsifier.sampled
        if sampled is not None:
            counted_BN = answer_BN & sampled.answer_span.is_long_B[:, None]
            text = torch.stack([sampled.text_mask_BN[counted_BN].sum(), counted_BN.sum()])
            if not sampled.image_masks:
                return text.new_zeros(2), text.detach()
            mask = torch.cat(list(sampled.image_masks))
            return torch.stack([mask.sum(), mask.new_tensor(mask.numel())]).detach(), text.detach()
        report = cast(Report, self.sparsifier.report)
        pictures = [flag for row in report.image_flags for flag in row]
        kept = answer_BN.new_zeros(2, 2, dtype=torch.float32)
        for row, flags in zip(kept, (pictures, report.text_kept), strict=True):
            row[0], row[1] = sum(int(flag.sum()) for flag in flags), sum(map(len, flags))
        return kept[0], kept[1]


def _divergence(logits_AV: Tensor, target_AV: Tensor, group: Group) -> Tensor:
    """Kullback-Leibler divergence from the teacher's next-token distribution, summed like the loss."""
    student, teacher = (x_AV.float().log_softmax(-1) for x_AV in (logits_AV, target_AV))
    losses_A = (teacher.exp() * (teacher - student)).sum(-1)
    return (losses_A * label_weights(group)).sum() if "weights" in group else losses_A.sum()


def _method(recipe: Recipe) -> MethodSettings:
    """Return the section that the recipe has made sure to have."""
    return cast(MethodSettings, recipe.method)


def _take_over(sparsifier: Sparsifier, trained: dict[str, Tensor], recipe: Recipe) -> None:
    """Go on from predictors that were trained before."""
    try:
        sparsifier.load_state_dict(trained)
    except RuntimeError as error:
        raise ValueError(
            f"{recipe.stage.init}: init has predictors of another shape than sparsity asks for: give the "
            "d_model, nhead, dim_feedforward and num_layers of its sparsifier_config.json"
        ) from error


def _adapt(model: PreTrainedModel, method: MethodSettings) -> Any:
    """Freeze what the recipe does not train; return peft's wrapper of ``model`` where it adds adapters."""
    if method.train == "full":
        return None
    model.requires_grad_(False)
    if method.train == "predictors":
        return None
    from peft import LoraConfig, get_peft_model

    decoder = f"{model.base_model_prefix}.{family_of(model).decoder}"
    config = LoraConfig(
        r=method.lora_rank,
        lora_alpha=2 * method.lora_rank,
        target_modules=rf"{re.escape(decoder)}{LORA_TARGETS}",
    )
    return get_peft_model(cast(Any, model), config)
