"""Files ``f_*``: a prompt, answer tokens one by one, a new turn at once, answer tokens again.

Legend: N tokens of a call, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dynamic_llava.core.report import Report
from dynamic_llava.verification.comparison import Comparison
from dynamic_llava.verification.files import GoldenFile
from dynamic_llava.verification.prefill import compare_cache
from dynamic_llava.verification.probe import Probe
from dynamic_llava.verification.subject import Subject

NO_DECISION = -1


@torch.no_grad()
def check_dialogue(subject: Subject, file: GoldenFile, comparison: Comparison) -> None:
    """Compare logits, decisions, positions and cache lengths over all calls; one row."""
    inputs = subject.inputs(file)
    fed = file["call_fed_lens"].tolist()
    calls = [{"input_ids": ids_N[None]} for ids_N in file["fed_tokens"].split(fed[1:])]
    logits: list[Tensor] = []
    lengths: list[Tensor] = []
    cache = None
    with subject.attached(subject.settings(file)) as model, Probe(model) as probe:
        for call in (inputs, *calls):
            out = model(**subject.placed(call), past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            logits.append(out.logits[0].cpu())
            lengths.append(subject.report.kv_lengths[:, 0])
    comparison.exact("call_logit_lens", torch.tensor([len(part) for part in logits]))
    comparison.logits("logits", torch.cat(logits))
    comparison.exact("position_ids_sparse", torch.cat([part[0] for part in probe.positions_BL]))
    comparison.exact("kv_len_per_call_layer", torch.stack(lengths))
    ours_N = _decisions(subject.report, [len(part) for part in logits])
    if "decision" in file:
        is_made_N = (ours_N != NO_DECISION) & (file["decision"] != NO_DECISION)
        comparison.exact("decision", ours_N, where=is_made_N)
    compare_cache(comparison, cache)


def _decisions(report: Report, lengths: list[int]) -> Tensor:
    """Return the decision on every token after the prompt: 0 or 1, -1 where none was made.

    The last token of a new turn stays without one.
    """
    text = iter(report.text_kept[0])
    new_turns = iter(report.prompt_decisions[1:])  # the first is the prompt's
    parts = [torch.full((lengths[0],), NO_DECISION)]
    for length in lengths[1:]:
        part_N = torch.full((length,), NO_DECISION)
        if length == 1:
            part_N[0] = next(text)
        elif report.prompt_decisions:
            kept_BN, droppable_BN = next(new_turns)
            part_N = torch.where(droppable_BN[0], kept_BN[0].long(), NO_DECISION).cpu()
        parts.append(part_N)
    return torch.cat(parts)
