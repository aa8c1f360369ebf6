"""Making a learned output predictor keep the share asked for, whatever its weights.

Legend: B batch, T output tokens.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from dynamic_llava.bench.workload import Workload
from dynamic_llava.sparsifier import Sparsifier


class _SeenEnough(Exception):
    """Ends a pass once the predictor has been asked."""


@torch.no_grad()
def keep_share(model: Any, sparsifier: Sparsifier, sample: Workload) -> None:
    """Shift the bias of the keep logit so that ``text_keep_rate`` of the output tokens of ``sample`` stay.

    The decisions are taken on what the dense layers return, which does not depend on what is dropped; so one
    pass through these over prompt and output tokens tells all of them.
    """
    seen: list[Tensor] = []

    def see(module: nn.Module, given: object, logits_BT2: Tensor) -> None:
        seen.append(logits_BT2)
        raise _SeenEnough

    predictor: Any = sparsifier.text_predictor
    handle = predictor.register_forward_hook(see)
    try:
        state = sparsifier.new_prompt(sample.prompt)
        model(**sample.all_inputs(), past_key_values=state, use_cache=False)
    except _SeenEnough:
        pass
    finally:
        handle.remove()
    keep_BT, drop_BT = seen[0].float().unbind(-1)
    margin_BT = keep_BT - drop_BT
    rate = sparsifier.config.text_keep_rate
    threshold = margin_BT.quantile(1 - rate) if rate < 1 else margin_BT.min() - 100  # far below: all stay
    predictor.output_mlp[-1].bias[0] -= threshold
