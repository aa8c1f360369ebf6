"""Arrays of kind e: one training step with a long and a short answer, padding on the right.

Legend: N tokens of a row, A tokens of a span.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import torch
from tests.verification.forge.inference import prompt
from tests.verification.forge.model import Shape
from tests.verification.forge.reference import Reference, gumbel
from torch import Tensor
from torch.nn import functional as F

TAU = 0.5
RATES = {
    "image": "vision_keep_rate",
    "output_text": "output_text_keep_rate",
    "instruct": "instruct_keep_rate",
}
MINIMA = {
    "image": None,
    "output_text": "output_text_len_for_training",
    "instruct": "instruct_len_for_training",
}
MASKS = {"image": "image_mask", "output_text": "output_text_mask", "instruct": "instruct_mask"}
LOSSES = {"image": "image_mask", "output_text": "output_text", "instruct": "instruct"}


class TrainedRow:
    """One row of the step; its masks are drawn when the decoder reaches the sparse layer."""

    def __init__(self, model: Reference, ids: list[int], pixels: Tensor, answer: int) -> None:
        self.model, self.ids, self.pixels = model, ids, pixels
        self.embeds_NC, image = model.embed(ids, pixels)
        length = len(self.embeds_NC)
        question = model.question(ids, image, length - answer)
        self.spans = {"image": image, "output_text": range(length - answer, length), "instruct": question}
        self.labels = [-100] * (length - answer) + ids[-answer:]
        self.masks: dict[str, Tensor] = {}
        self.scored: dict[str, Tensor] = {}
        self.policy_N = torch.ones(length)

    def run(self, noise: dict[str, Tensor]) -> None:
        """Compute the row with its noise ``[A, 2]`` for each kind of span."""

        def policy(entering_NC: Tensor) -> Tensor:
            for part, noise_A2 in noise.items():
                self.sample(part, entering_NC, noise_A2)
            return self.policy_N

        self.entering_NC, self.last_hidden_NC, self.logits_NV = self.model.train_row(self.embeds_NC, policy)

    def sample(self, part: str, entering_NC: Tensor, noise_A2: Tensor) -> None:
        """Draw the mask of one span."""
        span = self.spans[part]
        inside = entering_NC[span.start : span.stop]
        if part == "image":
            self.scored[part] = self.model.image_logits(inside)
        else:
            self.scored[part] = self.model.text_logits(inside, f"{part}_score_predictor")
        mask = gumbel(self.scored[part], noise_A2[: len(span)], TAU)
        self.masks[part] = mask if self.is_long(part) else torch.ones(len(span))
        self.policy_N = self.policy_N.index_put((torch.arange(span.start, span.stop),), self.masks[part])

    def is_long(self, part: str) -> bool:
        """Whether the span may lose tokens."""
        minimum = MINIMA[part]
        return minimum is None or len(self.spans[part]) >= self.model.sparse[minimum]

    def bounds(self) -> list[list[int]]:
        """Half-open spans: system, image, instruct, answer, last question."""
        image, answer, question = self.spans.values()
        ends = [0, image.start, image.stop, answer.start, answer.stop]
        return [list(pair) for pair in pairwise(ends)] + [[question.start, question.stop]]


def training(frozen: Reference, shape: Shape) -> dict[str, Any]:
    """Return all arrays of the file."""
    weights = {
        name: w.clone().requires_grad_(not name.startswith("vision")) for name, w in frozen.weights.items()
    }
    model = Reference(weights, frozen.config, frozen.vision)
    (long, first, generator), (short, second, _) = prompt(shape, 10, 26), prompt(shape, 11, 20)
    rows = [TrainedRow(model, long, first, 12), TrainedRow(model, short, second, 5)]
    noise = {}
    for part in RATES if shape.question else list(RATES)[:2]:
        size = (len(rows), max(len(row.spans[part]) for row in rows), 2)
        noise[part] = torch.from_numpy(generator.exponential(size=size).astype(np.float32))
    for row, *drawn in zip(rows, *noise.values(), strict=True):
        row.run(dict(zip(noise, drawn, strict=True)))
    losses = _losses(model, rows, list(noise))
    losses["loss_total"].backward()
    learnt = {name: w.grad for name, w in weights.items() if w.grad is not None}
    arrays = _inputs(rows) | _activations(rows) | losses | {f"noise_{part}": x for part, x in noise.items()}
    arrays["grad_names"] = [name if name.startswith("lm_head") else f"model.{name}" for name in learnt]
    arrays["grad_norms"] = torch.stack([gradient.norm() for gradient in learnt.values()])
    for name in ("layers.0.self_attn.k_proj.weight", "layers.3.self_attn.q_proj.weight"):
        arrays[f"grad__{name}"] = learnt[name]
    for part, drawn in noise.items():
        arrays[MASKS[part]] = _padded([row.masks[part] for row in rows], drawn.shape[1], -1.0)
        scored = [row.scored[part] for row in rows]
        arrays[f"{part}_score_predictor_logits"] = _padded(scored, drawn.shape[1])
    return arrays


def _losses(model: Reference, rows: list[TrainedRow], parts: list[str]) -> dict[str, Tensor]:
    logits = torch.cat([row.logits_NV[:-1] for row in rows])
    labels = torch.tensor([label for row in rows for label in row.labels[1:]])
    total = cross_entropy = F.cross_entropy(logits, labels)
    losses = {"loss_ce": cross_entropy}
    for part in parts:
        rate = model.sparse[RATES[part]]
        terms = [(rate - row.masks[part].mean()) ** 2 * row.is_long(part) for row in rows]
        losses[f"loss_{LOSSES[part]}_unweighted"] = torch.stack(terms).mean()
        total = total + model.sparse["mask_loss_weight"] * torch.stack(terms).mean()
    return losses | {"loss_total": total}


def _inputs(rows: list[TrainedRow]) -> dict[str, Any]:
    """Inputs with one placeholder a picture, and what becomes of them."""
    short, expanded = len(rows[0].ids), len(rows[0].labels)  # of the longer row
    labels = [
        row.labels[: row.spans["image"].start + 1] + row.labels[row.spans["image"].stop :] for row in rows
    ]
    return {
        "input_ids": _filled([row.ids for row in rows], short, 0),
        "attention_mask": _filled([[1] * len(row.ids) for row in rows], short, 0).bool(),
        "labels": _filled(labels, short, -100),
        "pixel_values": torch.stack([row.pixels for row in rows]),
        "tau": np.float64(TAU),
        "expanded_labels": _filled([row.labels for row in rows], expanded, -100),
        "expanded_attention_mask": _filled([[1] * len(row.labels) for row in rows], expanded, 0).bool(),
        "embeds_indices": torch.tensor([row.bounds() for row in rows]),
        "position_ids": torch.arange(expanded)[None],
    }


def _activations(rows: list[TrainedRow]) -> dict[str, Tensor]:
    length = len(rows[0].labels)
    return {
        "logits": _padded([row.logits_NV for row in rows], length),
        "hidden_in_sparse": _padded([row.entering_NC for row in rows], length),
        "last_hidden_state": _padded([row.last_hidden_NC for row in rows], length),
        "policy": _padded([row.policy_N[:, None] for row in rows], length, 1.0),
    }


def _padded(rows: list[Tensor], length: int, fill: float = 0.0) -> Tensor:
    return torch.stack(
        [torch.cat([row, row.new_full((length - len(row), *row.shape[1:]), fill)]) for row in rows]
    )


def _filled(rows: list[list[int]], length: int, fill: int) -> Tensor:
    return torch.tensor([row + [fill] * (length - len(row)) for row in rows])
