"""Files ``a_*`` and ``b_*``: one prefill, sparse or with the full context.

Legend: B batch, I image tokens, N tokens, L kept tokens, H key heads, S tokens in the cache, D head size.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from dynamic_llava.core.cache import Context, SparseLayer, context_of
from dynamic_llava.verification.comparison import Comparison
from dynamic_llava.verification.files import GoldenFile
from dynamic_llava.verification.probe import Probe
from dynamic_llava.verification.subject import Subject


@torch.no_grad()
def check_prefill(subject: Subject, file: GoldenFile, comparison: Comparison) -> None:
    """Compare everything that one pass over a prompt computes."""
    inputs = subject.inputs(file)
    is_full = file.name.startswith("b_")
    config = subject.settings(file)
    config.sparsify_image = not is_full and "image_keep_index" in file
    config.sparsify_prompt = "instruct_decision" in file
    with subject.attached(config) as model, Probe(model) as probe:
        out = model(**subject.placed(inputs), use_cache=True)
    _compare_inputs(subject, inputs, probe, comparison)
    comparison.logits("logits", out.logits)
    comparison.close("last_hidden_state", probe.last_hidden_BLC[0])
    comparison.positions("position_ids_after", probe.positions_BL[0])
    comparison.close("hidden_after_prune_in", probe.hidden_BLC[0])
    for row, lengths_L in enumerate(subject.report.kv_lengths.T):
        comparison.exact("kv_len_per_layer", lengths_L, note=f" (row {row})" if row else "")
    compare_cache(comparison, out.past_key_values)
    if config.sparsify_image:
        _compare_images(subject, probe, comparison)
    if config.sparsify_prompt:
        _compare_question(subject, probe, comparison)
    if is_full:
        comparison.logits("logits", subject.model(**subject.placed(inputs)).logits, note=" (detached)")


def compare_cache(comparison: Comparison, cache: Any) -> None:
    """Compare keys (after the rotary embedding) and values ``[B, H, S, D]`` of the layers in the file."""
    slots = cast(Context, context_of(cache)).slots
    for key in comparison.file.starting("k_layer") + comparison.file.starting("v_layer"):
        layer = cache.layers[int(key.removeprefix(key[0] + "_layer"))]
        stored_BHSD = layer.keys if key[0] == "k" else layer.values
        valid_BS = slots.valid_BS if isinstance(layer, SparseLayer) else slots.is_token_BN(layer.used)
        stored_BHSD, valid_BS = stored_BHSD[:, :, : valid_BS.shape[1]].cpu(), valid_BS.cpu()
        rows = [stored_HSD[:, valid_S] for stored_HSD, valid_S in zip(stored_BHSD, valid_BS, strict=True)]
        if len({row.shape for row in rows}) > 1:
            comparison.fail(key, "the rows hold different numbers of tokens")
        else:
            comparison.close(key, torch.stack(rows))


def _compare_inputs(
    subject: Subject, inputs: dict[str, Tensor], probe: Probe, comparison: Comparison
) -> None:
    """Compare what enters the decoder."""
    batch, length = inputs["input_ids"].shape
    end_B = torch.full((batch,), length)
    spans_B52 = subject.spans(inputs["input_ids"], end_B, end_B)
    remain_B52 = (probe.positions_BL[0][:, None, None] < spans_B52[..., None]).sum(-1)
    comparison.exact("embeds_indices", spans_B52)
    comparison.exact("embeds_indices_after", remain_B52)
    comparison.close("image_features", probe.features_KIC[0])
    comparison.close("inputs_embeds", probe.embeds_BNC[0])
    comparison.positions("position_ids_before", probe.dense_positions_BN[0])


def _compare_images(subject: Subject, probe: Probe, comparison: Comparison) -> None:
    """Compare the decision on image tokens and what leads to it."""
    report = subject.report
    scores_BI = torch.stack([torch.cat(scores) for scores in report.image_scores])
    kept = report.image_kept
    comparison.close("hidden_image_before_prune", probe.image_hidden_KIC[0])
    comparison.close("image_pred_logits", probe.image_logits_KI2[0])
    comparison.close("image_scores", scores_BI)
    comparison.exact("image_keep_index", torch.nn.utils.rnn.pad_sequence(kept, True, -1))
    best_BI = scores_BI.sort(descending=True).values
    last = len(kept[0]) - 1
    comparison.close("image_topk_margin", best_BI[:, last] - best_BI[:, last + 1])


def _compare_question(subject: Subject, probe: Probe, comparison: Comparison) -> None:
    """Compare the decision on the tokens of the last question, and what leads to it; one row."""
    decisions_BN, droppable_BN = (part_BN.cpu() for part_BN in subject.report.prompt_decisions[0])
    comparison.close("instruct_pred_logits", probe.prompt_logits_BN2[0][droppable_BN][None])
    comparison.exact("instruct_decision", decisions_BN[droppable_BN][None])
