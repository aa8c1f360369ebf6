"""Files ``c_*`` and ``d_*``: greedy generation, with and without a cache.

Legend: B batch, T generated tokens, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dynamic_llava.config import SparsityConfig
from dynamic_llava.methods.top_k import keep_count
from dynamic_llava.verification.comparison import TOLERANCE, Comparison
from dynamic_llava.verification.files import GoldenFile
from dynamic_llava.verification.prefill import compare_cache
from dynamic_llava.verification.probe import Probe
from dynamic_llava.verification.subject import Subject

BATCH_DEFECT = (
    "in batches, the official code fills up shorter rows of its cache with zero keys and attends to them; "
    "the same rows alone, ref_row*, are compared instead"
)
NO_CACHE_DEFECT = (
    "without a cache, the official code doubles the last prompt token, ranks output tokens by the raw keep "
    "logit and never resets where the answer starts; here such a run makes the decisions of a cached run, "
    "which it is compared with"
)
INPUTS = ("input_ids", "pixel_values", "first_input_ids", "first_pixel_values", "seed")


@dataclass(frozen=True)
class _Run:
    """A finished generation: tokens ``[B, T]``, logits ``[B, T, V]``, decisions by row."""

    tokens_BT: Tensor
    logits_BTV: Tensor
    kept: list[Tensor]
    cache: Any


def check_cached(subject: Subject, file: GoldenFile, comparison: Comparison) -> None:
    """Compare generation with a cache; batches of the official code with its own single rows."""
    inputs = subject.inputs(file)
    rows = [key.removesuffix("tokens") for key in file.starting("ref_row") if key.endswith("_tokens")]
    steps = file[f"{rows[0]}tokens" if rows else "tokens"].shape[1]
    with subject.attached(_settings(subject, file)) as model, Probe(model) as probe:
        run = _generate(model, inputs, steps)
    comparison.positions("position_ids_prefill_after", probe.positions_BL[0])
    if not rows:
        _compare_run(subject, run, probe, comparison)
        return
    for row, prefix in enumerate(rows):
        comparison.exact(f"{prefix}tokens", run.tokens_BT[row : row + 1])
        comparison.logits(f"{prefix}step_logits", run.logits_BTV[row : row + 1])
        comparison.exact(f"{prefix}keep_decision", run.kept[row][None])
        comparison.exact(f"{prefix}kv_len_per_layer", subject.report.kv_lengths[:, row])
    comparison.defect([key for key in file.keys if key not in (*INPUTS, *file.used)], BATCH_DEFECT)


def check_without_cache(subject: Subject, file: GoldenFile, comparison: Comparison) -> None:
    """Compare generation without a cache with cached runs of the same rows alone."""
    inputs = subject.inputs(file)
    steps = file["tokens"].shape[1]
    with subject.attached(_settings(subject, file)) as model:
        if "first_input_ids" in file:  # an earlier prompt must leave no trace
            _generate(model, subject.inputs(file, "first_"), steps, use_cache=False)
        run = _generate(model, inputs, steps, use_cache=False)
        for row in range(len(run.tokens_BT)):
            alone = _generate(model, {key: x[row : row + 1] for key, x in inputs.items()}, steps)
            note = f"row {row} without cache = cached alone: "
            comparison.against(note + "tokens", alone.tokens_BT[0], run.tokens_BT[row], None)
            comparison.against(note + "logits", alone.logits_BTV[0], run.logits_BTV[row], TOLERANCE)
            comparison.against(note + "decisions", alone.kept[0], run.kept[row], None)
    comparison.defect([key for key in file.keys if key not in INPUTS], NO_CACHE_DEFECT)


def check_both(subject: Subject, file: GoldenFile, comparison: Comparison) -> None:
    """Compare generation with and without a cache with the official cached run."""
    check_cached(subject, file, comparison)
    with subject.attached(_settings(subject, file)) as model:
        run = _generate(model, subject.inputs(file), file["tokens"].shape[1], use_cache=False)
    note = " (without cache)"
    comparison.exact("tokens", run.tokens_BT, note=note)
    comparison.logits("step_logits", run.logits_BTV, note=note)
    comparison.exact("keep_decision", torch.stack(run.kept), note=note)


def _settings(subject: Subject, file: GoldenFile) -> SparsityConfig:
    """Return which predictors were on: by the file's name, the prompt's by the length it left."""
    config, variant = subject.settings(file), file.name.removeprefix("c_gen_")
    config.sparsify_image &= not variant.startswith(("full", "outtextonly"))
    config.sparsify_text &= not variant.startswith(("full", "visiononly"))
    if "position_ids_prefill_after" in file:
        kept = subject.image_tokens
        if config.sparsify_image:
            kept = keep_count(kept, config.image_keep_rate)
        whole = file["input_ids"].shape[1] - 1 + kept
        config.sparsify_prompt &= file["position_ids_prefill_after"].shape[1] < whole
    return config


def _generate(model: Any, inputs: dict[str, Tensor], steps: int, use_cache: bool = True) -> _Run:
    out = model.generate(
        **{name: value.to(model.device) for name, value in inputs.items()},
        max_new_tokens=steps,
        do_sample=False,
        use_cache=use_cache,
        return_dict_in_generate=True,
        output_logits=True,
    )
    tokens_BT = out.sequences[:, inputs["input_ids"].shape[1] :].cpu()
    kept = [kept_T.cpu() for kept_T in model.sparsifier.report.text_kept]
    return _Run(tokens_BT, torch.stack(out.logits, dim=1).cpu(), kept, out.past_key_values)


def _compare_run(subject: Subject, run: _Run, probe: Probe, comparison: Comparison) -> None:
    lengths_LB = subject.report.kv_lengths
    best_BT2 = run.logits_BTV.topk(2).values
    comparison.exact("tokens", run.tokens_BT)
    comparison.logits("step_logits", run.logits_BTV)
    comparison.logits("final_logits", run.logits_BTV[:, -1])
    comparison.close("step_top1_margin", best_BT2[..., 0] - best_BT2[..., 1])
    comparison.exact("keep_decision", torch.stack(run.kept))
    if probe.text_logits_BN2:
        comparison.close("out_pred_logits", torch.cat(probe.text_logits_BN2, dim=1))
    comparison.positions("position_ids_decode", torch.cat(probe.positions_BL[1:], dim=-1))
    comparison.exact("kv_len_per_layer", lengths_LB[:, 0])
    comparison.exact("true_cache_length", lengths_LB)
    comparison.close("final_last_hidden_state", probe.last_hidden_BLC[-1])
    compare_cache(comparison, run.cache)
