"""What measured answers cost to decode and to hold, row by row, by count."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

import torch
from torch import Tensor
from transformers import PreTrainedModel

from dynamic_llava.chat.asking import report_of
from dynamic_llava.costs.flops import paper_flops, text_predictor_flops
from dynamic_llava.costs.shape import DecoderShape
from dynamic_llava.methods import held_before


@dataclass(frozen=True)
class Row:
    """One answer: tokens of its prompt, how many of them the sparse layers hold, which output tokens stay.

    ``kept_T`` is bool, one decision for each output token that was fed back.
    """

    prompt: int
    prompt_kept: int
    kept_T: Tensor


def costs(model: PreTrainedModel, rows: Sequence[Row]) -> dict[str, float]:
    """Return the mean costs of decoding ``rows`` as the model stands, dense or sparse.

    Returns
    -------
    dict
        ``decode_tflops_paper``: one pass over the output tokens, without the prompt, see
        :func:`~dynamic_llava.costs.flops.paper_flops`; ``decode_tflops``: every step over its context, with
        the predictor (norms and lm head left out); ``kv_bytes``: keys and values held at the end, prompt
        included. Each is the mean over answers.
    """
    shape = DecoderShape.from_config(model.config.get_text_config())
    report = report_of(model)
    layer = shape.layers if report is None else report.config.layer
    bytes_per_token = shape.kv_bytes_per_token(model.dtype.itemsize)
    predictor = 0.0
    if report is not None and report.config.sparsify_text and report.config.text_policy == "learned":
        predictor = text_predictor_flops(report.config, shape.hidden)
    paper, true, bytes_held = [], [], []
    for row in rows:
        output, kept = len(row.kept_T), int(row.kept_T.sum())
        paper.append(paper_flops(shape, output, kept, layer))
        held_T = torch.arange(output) if report is None else held_before(report.config, row.kept_T)
        true.append(_decode_flops(shape, layer, row, held_T) + output * predictor)
        tokens = layer * (row.prompt + output) + (shape.layers - layer) * (row.prompt_kept + kept)
        bytes_held.append(bytes_per_token * tokens)
    return {
        "decode_tflops_paper": round(fmean(paper) / 1e12, 9),
        "decode_tflops": round(fmean(true) / 1e12, 9),
        "kv_bytes": round(fmean(bytes_held)),
    }


def _decode_flops(shape: DecoderShape, layer: int, row: Row, held_T: Tensor) -> float:
    """FLOPs of all steps with a cache; a token sees itself whether it stays or not."""
    output = len(row.kept_T)
    if output == 0:
        return 0.0
    seen = row.prompt_kept + held_T.double().mean().item() + 1
    dense = shape.layer_flops(output, row.prompt + (output + 1) / 2)
    return layer * dense + (shape.layers - layer) * shape.layer_flops(output, seen)
