"""Setting the output predictor's threshold after training, so that its hard decisions keep the target share.

Training samples decisions with noise, and the ratio loss holds the share of the *samples*: logits that are
all a little below zero keep half of the tokens with noise and hardly any without. The ranking is what was
learned; the threshold is set here.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from dynamic_llava.data.training import model_inputs
from dynamic_llava.sparsifier import Sparsifier

QUANTILES = 41  # every 2.5 %


@torch.no_grad()
def set_text_threshold(
    model: nn.Module, sparsifier: Sparsifier, groups: Iterable[Mapping[str, Any]]
) -> float | None:
    """Shift the keep logit so that ``text_keep_rate`` of the long answers' tokens in ``groups`` are kept.

    The quantiles of the shifted margins go into the config, so that other rates can be asked for later.

    Parameters
    ----------
    model
        The model that ``sparsifier`` is attached to; left in evaluation mode.
    groups
        Rows with answers; the decisions on them do not depend on what is dropped, for they are taken below
        layer l.

    Returns
    -------
    float or None
        The shift, added to the bias of the keep logit; None where no answer is long enough to lose tokens.
    """
    model.eval()
    margins: list[Tensor] = []
    seen: list[Tensor] = []
    predictor: Any = sparsifier.text_predictor
    handle = predictor.register_forward_hook(lambda _, __, logits: seen.append(logits))
    try:
        for group in groups:
            answer_BN = group["answer_mask"]
            long_BN = answer_BN & (answer_BN.sum(-1, keepdim=True) >= sparsifier.config.min_answer_length)
            if not long_BN.any():
                continue
            seen.clear()
            cast(Any, model)(**model_inputs(group), answer_mask=answer_BN, use_cache=False, logits_to_keep=1)
            keep_BN, drop_BN = seen[-1].float().unbind(-1)
            margins.append((keep_BN - drop_BN)[long_BN])
    finally:
        handle.remove()
    if not margins:
        return None
    margin = torch.cat(margins)
    shift = -margin.quantile(1 - sparsifier.config.text_keep_rate).item()
    predictor.output_mlp[-1].bias[0] += shift
    quantiles = margin.quantile(torch.linspace(0, 1, QUANTILES, device=margin.device)) + shift
    sparsifier.config.text_margins = tuple(round(value, 4) for value in quantiles.tolist())
    return shift
