"""What a recipe will do, before it does: parameters, tokens, steps; memory, work and disk, all computed."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, cast

import torch
from rich.table import Table
from torch import nn

from dynamic_llava.costs.shape import DecoderShape
from dynamic_llava.data.training import IGNORE
from dynamic_llava.families import family_of
from dynamic_llava.training import optimizers
from dynamic_llava.training.feeding import Feed
from dynamic_llava.training.recipe import Recipe
from dynamic_llava.training.stages.objective import Objective

SAMPLES = 8  # of the data, looked at for the number of tokens
GIB = 2**30
REFERENCE_RATE = 100e12  # FLOPs a second: what a training reaches on an A100, a third of what the chip can


@dataclass(frozen=True)
class Plan:
    """A training in numbers.

    Attributes
    ----------
    parameters
        Trained parameters of each group, with its peak learning rate.
    frozen
        Parameters that are not trained.
    samples, steps
        Items of the data, and optimizer steps of one process.
    tokens_per_sample
        Mean over the first samples; a drawn step counts as one.
    memory_bytes
        Computed, of one process: weights, gradients, optimizer state, the dense teacher where there is one,
        and activations by a rule of thumb; ``total`` is their sum.
    decoder_flops
        Computed, of the whole training: the decoder's matrix products, two for each weight, token and pass
        over it; attention's N x N and the vision tower are left out.
    disk_bytes
        Computed: ``checkpoints``, as many as are kept, and the finished ``model``.
    """

    parameters: dict[str, tuple[int, float]]
    frozen: int
    samples: int
    steps: int
    tokens_per_sample: float
    memory_bytes: dict[str, int]
    decoder_flops: float
    disk_bytes: dict[str, int]

    @property
    def hours(self) -> float:
        """Hours of the decoder's work at ``REFERENCE_RATE``."""
        return self.decoder_flops / REFERENCE_RATE / 3600

    @classmethod
    def of(cls, recipe: Recipe, objective: Objective, data: Feed) -> Plan:
        """Count; nothing is computed."""
        groups = optimizers.parameter_groups(recipe.optimizer, objective)
        parameters = {
            group["name"]: (sum(p.numel() for p in group["params"]), group["lr"]) for group in groups
        }
        frozen = sum(p.numel() for p in objective.parameters() if not p.requires_grad)
        samples = len(data.train)  # type: ignore[arg-type]
        looked = [data.collate([data.train[i]]) for i in range(min(SAMPLES, samples))]
        tokens = [sum(_tokens(group) for group in batch["groups"]) for batch in looked]
        mean = sum(tokens) / max(1, len(tokens))
        per_step = recipe.data.batch_size * recipe.data.accumulate
        steps = recipe.run.steps or max(1, round(samples * recipe.run.epochs / per_step))
        labelled = sum(int((g["labels"] != IGNORE).sum()) for batch in looked for g in batch["groups"])
        rows = recipe.data.batch_size
        memory = _memory(recipe, objective, groups, mean * rows, labelled / max(1, len(looked)) * rows)
        flops = steps * per_step * mean * _passes(recipe, objective) * 2.0
        return cls(
            parameters,
            frozen,
            samples,
            steps,
            round(mean, 1),
            memory,
            flops,
            _disk(recipe, objective, groups, memory),
        )

    def as_json(self) -> dict[str, Any]:
        """Plain values by name."""
        return asdict(self) | {"hours_at_100_tflops": round(self.hours, 2)}

    def tables(self) -> list[Table]:
        """Return what to show: parameters, then the run."""
        groups = Table("group", "parameters", "peak learning rate", title="parameters")
        for name, (number, rate) in self.parameters.items():
            groups.add_row(name, f"{number:,}", f"{rate:g}")
        groups.add_row("frozen", f"{self.frozen:,}", "-")
        run = Table("", "", title="run", show_header=False)
        run.add_row("samples", f"{self.samples:,}")
        run.add_row("optimizer steps", f"{self.steps:,}")
        run.add_row("tokens a sample", f"{self.tokens_per_sample:,}")
        for kind, parts in (("memory", self.memory_bytes), ("disk", self.disk_bytes)):
            for name, number in parts.items():
                run.add_row(f"{kind}, computed: {name}", f"{number / GIB:,.2f} GiB")
        run.add_row("work, computed: decoder", f"{self.decoder_flops:.2g} FLOPs")
        run.add_row("hours at 100 TFLOPs a second", f"{self.hours:,.1f}")
        return [groups, run]


def _tokens(group: Any) -> int:
    """Tokens of a group's rows, padding included; pictures alone count as rows."""
    ids = group.get("input_ids")
    return len(group["labels"]) if ids is None else ids.numel()


def _memory(
    recipe: Recipe, objective: Objective, groups: list[dict[str, Any]], tokens: float, labelled: float
) -> dict[str, int]:
    """Estimate the peak of one process, in bytes, nothing sharded."""
    trained = [p for group in groups for p in group["params"]]
    states = {"matrices": 1}  # Muon has one moment, AdamW two
    optimizer = sum(
        states.get(group["name"], 2) * sum(p.numel() * p.element_size() for p in group["params"])
        for group in groups
    )
    memory = {
        "weights": sum(p.numel() * p.element_size() for p in objective.parameters()),
        "gradients": sum(p.numel() * p.element_size() for p in trained),
        "optimizer": optimizer,
        "teacher": _teacher(recipe, objective),
        "activations": _activations(recipe, objective, tokens, labelled),
    }
    return memory | {"total": sum(memory.values())}


def _teacher(recipe: Recipe, objective: nn.Module) -> int:
    """Return the bytes of the dense model that is learnt from: a copy of the one that is trained."""
    if recipe.method is None or not recipe.method.distill_weight:
        return 0
    added = (".sparsifier.", ".lora_")
    names = objective.named_parameters()
    number = sum(p.numel() for name, p in names if not any(part in name for part in added))
    return number * getattr(torch, recipe.stage.init_dtype).itemsize


def _passes(recipe: Recipe, objective: Objective) -> float:
    """Return how many weights of the decoder a token goes through, forward and backward, in all passes."""
    if recipe.stage.name == "vision":
        return 0
    model = objective.model
    decoder: Any = model.base_model.get_submodule(family_of(model).decoder)
    shape = DecoderShape.from_config(decoder.config)
    own = dict(decoder.layers.named_parameters())
    added = sum(p.numel() for name, p in own.items() if ".lora_" in name)
    all_of_them = shape.layers * shape.layer_weights + added  # of experts, those that a token meets
    trained_share = sum(p.numel() for p in own.values() if p.requires_grad) / sum(
        map(torch.numel, own.values())
    )
    passes = 2 + recipe.run.gradient_checkpointing  # forward, through the activations, forward again
    if recipe.method is not None and recipe.method.distill_weight:
        passes += 1
    return (passes + trained_share) * all_of_them


def _disk(
    recipe: Recipe, objective: nn.Module, groups: list[dict[str, Any]], memory: dict[str, int]
) -> dict[str, int]:
    """Return the bytes of the checkpoints, which hold what is trained, and of the finished model."""
    trained = sum(p.numel() * p.element_size() for group in groups for p in group["params"])
    is_whole = recipe.method is None or recipe.method.changes_model
    last = [p for p in objective.parameters() if is_whole or p.requires_grad]
    size = getattr(torch, recipe.run.save_dtype).itemsize
    return {
        "checkpoints": recipe.run.keep_checkpoints * (trained + memory["optimizer"]),
        "model": sum(p.numel() for p in last) * size,
    }


def _activations(recipe: Recipe, objective: Objective, tokens: float, labelled: float) -> int:
    """Estimate kept activations: 34 numbers a channel and layer (Korthikanti et al. 2022, without N x N).

    The loss holds four float32 numbers a word of the vocabulary for each labelled token.
    """
    text = cast(Any, objective.model).config.get_text_config()
    dtype = recipe.run.precision if recipe.run.precision == "bfloat16" else recipe.stage.init_dtype
    size = getattr(torch, dtype).itemsize
    one_layer = 34 * tokens * text.hidden_size * size / 2  # their count is in bytes of 16-bit numbers
    loss = labelled * text.vocab_size * 4 * 4
    if not recipe.run.gradient_checkpointing:
        return round(loss + one_layer * text.num_hidden_layers)
    return round(loss + one_layer + tokens * text.hidden_size * size * text.num_hidden_layers)
