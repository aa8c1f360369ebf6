"""What measured answers cost to decode and to hold, row by row, by count."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from torch import Tensor

from dynamic_llava.config import SparsityConfig
from dynamic_llava.costs.answer import decode_layer_flops
from dynamic_llava.costs.decisions import output_decision_flops
from dynamic_llava.costs.flops import paper_flops
from dynamic_llava.costs.shape import DecoderShape


@dataclass(frozen=True)
class Row:
    """One answer: tokens of its prompt, how many of them the sparse layers hold, which output tokens stay.

    ``kept_T`` is bool, one decision for each output token that was fed back.
    """

    prompt: int
    prompt_kept: int
    kept_T: Tensor


def mean_costs(
    config: SparsityConfig | None, shape: DecoderShape, element_size: int, rows: Sequence[Row]
) -> dict[str, float]:
    """Return the mean costs of decoding ``rows``; without a config, of the dense model.

    Returns
    -------
    dict
        ``decode_tflops_paper``: one pass over the output tokens, without the prompt, see
        :func:`~dynamic_llava.costs.flops.paper_flops`; ``decode_tflops``: every step over its context, with
        the predictor (norms and lm head left out); ``kv_bytes``: keys and values held at the end, prompt
        included, at ``element_size`` bytes a number. Each is the mean over answers.
    """
    layer = shape.layers if config is None else config.layer
    config = config or SparsityConfig(sparsify_image=False, sparsify_text=False)
    decision, token_bytes = (
        output_decision_flops(config, shape.hidden),
        shape.kv_bytes_per_token(element_size),
    )
    paper, true, bytes_held = [], [], []
    for row in rows:
        output, kept = len(row.kept_T), int(row.kept_T.sum())
        paper.append(paper_flops(shape, output, kept, layer))
        sparse, dense = decode_layer_flops(config, shape, row.kept_T, row.prompt, row.prompt_kept)
        true.append(layer * dense + (shape.layers - layer) * sparse + output * decision)
        tokens = layer * (row.prompt + output) + (shape.layers - layer) * (row.prompt_kept + kept)
        bytes_held.append(token_bytes * tokens)
    return {
        "decode_tflops_paper": round(fmean(paper) / 1e12, 9),
        "decode_tflops": round(fmean(true) / 1e12, 9),
        "kv_bytes": round(fmean(bytes_held)),
    }
