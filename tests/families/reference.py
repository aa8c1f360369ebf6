"""An independent reference: the stock model over the whole sequence, dropped columns closed in its masks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def closed(mask: Tensor, keep_N: Tensor) -> Tensor:
    """Close the columns of dropped tokens in an additive mask; each token still sees itself."""
    own = torch.eye(mask.shape[-1], dtype=torch.bool)
    return mask.masked_fill(~(keep_N | own), torch.finfo(mask.dtype).min)


@torch.no_grad()
def logits(model: Any, decoder: Any, split: int, inputs: dict[str, Tensor], keep_N: Tensor) -> Tensor:
    """Return the logits ``[N, V]`` of one row, eager and without a cache.

    ``keep_N`` says which tokens the layers from ``split`` on may see later.
    """

    def close(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return args, kwargs | {"attention_mask": closed(kwargs["attention_mask"], keep_N)}

    handles = [layer.register_forward_pre_hook(close, with_kwargs=True) for layer in decoder.layers[split:]]
    try:
        return model(**inputs, use_cache=False).logits[0]
    finally:
        for handle in handles:
            handle.remove()
