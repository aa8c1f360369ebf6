"""Setting the output predictor's threshold after training, so that its hard decisions keep the target share.

Training samples decisions with noise, and the ratio loss holds the share of the *samples*: logits that are
all a little below zero keep half of the tokens with noise and hardly any without. The ranking is what was
learned; the threshold is set here.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, cast

import torch
from torch import Tensor, nn

from dynamic_llava.sparsifier import Sparsifier
from dynamic_llava.training.packing import Batch, model_inputs

QUANTILES = 41  # every 2.5 %


@torch.no_grad()
def set_text_threshold(model: nn.Module, sparsifier: Sparsifier, batches: Iterable[Batch]) -> float:
    """Shift the keep logit so that ``text_keep_rate`` of the answer tokens of ``batches`` are kept.

    The quantiles of the shifted margins go into the config, so that other rates can be asked for later.

    Parameters
    ----------
    model
        The model that ``sparsifier`` is attached to; left in evaluation mode.
    batches
        Rows with long answers; the decisions on them do not depend on what is dropped, for they are taken
        below layer l.

    Returns
    -------
    float
        The shift, added to the bias of the keep logit.
    """
    model.eval()
    margins: list[Tensor] = []
    seen: list[Tensor] = []
    handle = sparsifier.text_predictor.register_forward_hook(lambda _, __, logits: seen.append(logits))
    try:
        for batch in batches:
            seen.clear()
            cast(Any, model)(**model_inputs(batch), answer_mask=batch.answer_mask_BN)
            keep_BN, drop_BN = seen[-1].float().unbind(-1)
            margins.append((keep_BN - drop_BN)[batch.answer_mask_BN])
    finally:
        handle.remove()
    margin = torch.cat(margins)
    shift = -margin.quantile(1 - sparsifier.config.text_keep_rate).item()
    cast(nn.Linear, sparsifier.text_predictor.output_mlp[-1]).bias[0] += shift
    quantiles = margin.quantile(torch.linspace(0, 1, QUANTILES)) + shift
    sparsifier.config.text_margins = tuple(round(value, 4) for value in quantiles.tolist())
    return shift
