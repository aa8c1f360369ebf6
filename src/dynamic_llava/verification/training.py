"""Files ``e_*``: the training pass with the official code's noise, its losses and its gradients.

Legend: B batch, T tokens with one placeholder, N tokens, A tokens of a padded span, C channels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from dynamic_llava.core.sampled import Sampled
from dynamic_llava.verification.comparison import Comparison
from dynamic_llava.verification.files import GoldenFile
from dynamic_llava.verification.probe import Probe
from dynamic_llava.verification.subject import IGNORED, Subject

OFFICIAL_EPS = 1e-6
MASK_TOLERANCE = 1e-6
GRADIENT_TOLERANCE = 5e-4  # relative where above 1
PADDED = -1.0


@dataclass(frozen=True)
class _Batch:
    """The inputs of a training step, and its spans: system, image, instruct, answer, last question."""

    inputs: dict[str, Tensor]
    spans_B52: Tensor
    valid_BN: Tensor
    answer_BN: Tensor
    question_BN: Tensor


@dataclass(frozen=True)
class _Step:
    """What a training step computed: logits, loss and its parts, gradients by parameter."""

    logits_BNV: Tensor
    cross_entropy: Tensor
    penalties: tuple[Tensor, Tensor, Tensor]
    loss: Tensor
    gradients: dict[str, Tensor | None]


def check_training(subject: Subject, file: GoldenFile, comparison: Comparison) -> None:
    """Compare masks, activations, losses and gradients of one training step.

    The official eps of the masked softmax reproduces the official pass; without it, the default, the result
    is the same within the tolerance.
    """
    batch = _batch(subject, file)
    for eps in (0.0, OFFICIAL_EPS):
        step, probe = _train(subject, file, batch, eps)
        note = "" if eps else " (without eps)"
        comparison.logits("logits", step.logits_BNV, where=batch.valid_BN, note=note)
        _compare_losses(step, comparison, note)
        _compare_gradients(subject, step.gradients, comparison, note)
    comparison.exact("expanded_labels", batch.inputs["labels"])
    comparison.exact("expanded_attention_mask", batch.inputs["attention_mask"])
    comparison.exact("embeds_indices", batch.spans_B52)
    comparison.positions("position_ids", probe.dense_positions_BN[0])
    comparison.close("hidden_in_sparse", probe.hidden_BLC[0], where=batch.valid_BN)
    comparison.close("last_hidden_state", probe.last_hidden_BLC[0], where=batch.valid_BN)
    if (policy_BN := probe.policy_BN[0]) is not None:
        comparison.close("policy", policy_BN[..., None], MASK_TOLERANCE)
    _compare_masks(subject, probe, batch, comparison)


def _batch(subject: Subject, file: GoldenFile) -> _Batch:
    """Expand the inputs; the answer starts after the last label that is ignored."""
    ids_BT = file["input_ids"]
    inputs = subject.inputs(file)
    inputs["attention_mask"] = subject.expand(file["attention_mask"].long(), ids_BT, 1)
    inputs["labels"] = subject.expand(file["labels"], ids_BT, IGNORED)
    valid_BN = inputs["attention_mask"].bool()
    column_N = torch.arange(valid_BN.shape[1])
    start_B = torch.where((inputs["labels"] == IGNORED) & valid_BN, column_N, -1).amax(-1) + 1
    spans_B52 = subject.spans(inputs["input_ids"], start_B, valid_BN.sum(-1))
    answer_BN, question_BN = (
        (column_N >= spans_B52[:, span, :1]) & (column_N < spans_B52[:, span, 1:]) for span in (3, 4)
    )
    return _Batch(inputs, spans_B52, valid_BN, answer_BN, question_BN)


def _train(subject: Subject, file: GoldenFile, batch: _Batch, eps: float) -> tuple[_Step, Probe]:
    """Run a training step, with the file's noise in place of the sparsifier's own."""
    sparsifier, draw = subject.sparsifier, subject.sparsifier.noise
    noises = _noises(file, batch)
    config = subject.settings(file)
    config.sparsify_image = "noise_image" in file
    config.sparsify_text = "noise_output_text" in file
    config.sparsify_prompt = "noise_instruct" in file
    config.softmax_eps = eps
    try:
        with subject.attached(config) as model, Probe(model) as probe:
            model.train()
            model.zero_grad()
            sparsifier.tau, sparsifier.noise = (
                float(file["tau"]),
                lambda logits: noises.pop(0).to(logits.device),
            )
            masks = {"answer_mask": batch.answer_BN, "prompt_mask": batch.question_BN}
            out = model(**subject.placed(batch.inputs | masks))
            penalties = sparsifier.ratio_loss()
            loss = out.loss + config.ratio_weight * sum(penalties)
            loss.backward()
            gradients = {
                name: None if parameter.grad is None else parameter.grad.cpu()
                for name, parameter in model.named_parameters()
            }
    finally:
        sparsifier.noise = draw
    return _Step(out.logits, out.loss, penalties, loss, gradients), probe


def _noises(file: GoldenFile, batch: _Batch) -> list[Tensor]:
    """Return the official noise in the order and layout in which the library draws its own."""
    noises = []
    if "noise_output_text" in file:
        noises.append(_to_the_right(file["noise_output_text"], batch.answer_BN.sum(-1)))
    if "noise_instruct" in file:
        noises.append(_to_the_right(file["noise_instruct"], batch.question_BN.sum(-1)))
    if "noise_image" in file:
        noises.append(file["noise_image"])
    return noises


def _to_the_right(left_BA2: Tensor, length_B: Tensor) -> Tensor:
    """Move the first ``length`` entries of each row to its end."""
    rows = zip(left_BA2, length_B.tolist(), strict=True)
    return torch.stack([row_A2.roll(len(row_A2) - length, 0) for row_A2, length in rows])


def _compare_masks(subject: Subject, probe: Probe, batch: _Batch, comparison: Comparison) -> None:
    sampled = cast(Sampled, subject.sparsifier.sampled)
    if sampled.image_masks:
        comparison.close("image_mask", torch.stack(list(sampled.image_masks)), MASK_TOLERANCE)
    if probe.image_logits_KI2:
        comparison.close("image_score_predictor_logits", probe.image_logits_KI2[0])
    texts = (
        ("output_text", batch.answer_BN, sampled.text_mask_BN, probe.text_logits_BN2),
        ("instruct", batch.question_BN, sampled.prompt_mask_BN, probe.prompt_logits_BN2),
    )
    for name, span_BN, mask_BN, logits_BA2 in texts:
        length_B1 = span_BN.sum(-1, keepdim=True)
        is_token_BA = torch.arange(int(length_B1.max())) < length_B1
        if mask_BN is not None:
            padded_BA = torch.full(is_token_BA.shape, PADDED)
            padded_BA[is_token_BA] = mask_BN.detach().cpu()[span_BN]
            comparison.close(f"{name}_mask", padded_BA, MASK_TOLERANCE)
        if logits_BA2:
            left_BA2 = torch.zeros_like(logits_BA2[0])
            left_BA2[is_token_BA] = logits_BA2[0][is_token_BA.flip(-1)]
            comparison.close(f"{name}_score_predictor_logits", left_BA2, where=is_token_BA)


def _compare_losses(step: _Step, comparison: Comparison, note: str) -> None:
    comparison.close("loss_ce", step.cross_entropy, relative=True, note=note)
    comparison.close("loss_total", step.loss, relative=True, note=note)
    for part, penalty in zip(("image", "output_text", "instruct"), step.penalties, strict=True):
        for key in comparison.file.starting(f"loss_{part}"):  # the end of the name differs by part
            comparison.close(key, penalty, MASK_TOLERANCE, note=note)


def _compare_gradients(
    subject: Subject, gradients: dict[str, Tensor | None], comparison: Comparison, note: str
) -> None:
    """Compare the norm of every parameter's gradient, and some gradients in full."""
    file = comparison.file

    def gradient(official: str) -> Tensor:
        found = gradients[subject.our_name(official)]
        return torch.zeros(()) if found is None else found

    if "grad_names" in file:
        norms = torch.stack([gradient(name).norm() for name in file.strings("grad_names")])
        comparison.close("grad_norms", norms, GRADIENT_TOLERANCE, relative=True, note=note)
    for key in file.starting("grad__"):
        ours = gradient(key.replace("grad__", "model.", 1))
        comparison.close(key, ours, GRADIENT_TOLERANCE, relative=True, note=note)
