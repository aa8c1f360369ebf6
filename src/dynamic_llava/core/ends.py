"""Where the answers of a batch end: ``generate`` feeds padding to the rows that are finished.

Legend: B batch, T output tokens fed back.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor


class Ends(NamedTuple):
    """The ids that end an answer, and the one that finished rows are fed; None where nobody knows."""

    tokens: tuple[int, ...] = ()
    pad: int | None = None

    @classmethod
    def of(cls, model: Any) -> Ends:
        """Return those that ``generate`` takes from a model, unless it is told others."""
        config = getattr(model, "generation_config", None)
        given = getattr(config, "eos_token_id", None)
        tokens = tuple(given) if isinstance(given, list | tuple) else () if given is None else (int(given),)
        pad = getattr(config, "pad_token_id", None)
        return cls(tokens, tokens[0] if pad is None and tokens else pad)

    def is_over(self, ids: Tensor) -> Tensor:
        """Return which ids are of an end or what comes after it, bool like ``ids``."""
        known = (*self.tokens, self.pad) if self.tokens and self.pad is not None else self.tokens
        return torch.isin(ids, torch.tensor(known, dtype=ids.dtype, device=ids.device))

    def lengths(self, ids_BT: Tensor) -> Tensor:
        """Return how many output tokens each row would have been fed alone: int64 ``[B]``.

        A row's end token is fed back only while other rows go on, and padding after it; what else came last
        before the padding (``stop_strings``) would not have been fed back either. A row alone has no end,
        nor has a model without an end token.
        """
        batch, fed = ids_BT.shape
        whole_B = torch.full((batch,), fed, device=ids_BT.device)
        if batch == 1 or fed == 0 or not self.tokens:
            return whole_B
        is_pad_BT = torch.zeros_like(ids_BT) if self.pad is None else (ids_BT == self.pad).long()
        padding_B = is_pad_BT.flip(-1).cumprod(-1).sum(-1)
        end_B = whole_B - padding_B
        last_B1 = ids_BT.gather(1, (end_B - 1).clamp(min=0)[:, None])
        is_end_B = torch.isin(
            last_B1[:, 0], torch.tensor(self.tokens, dtype=ids_BT.dtype, device=ids_BT.device)
        )
        if self.pad not in self.tokens:
            is_end_B = is_end_B | (padding_B > 0)
        return (end_B - is_end_B.long()).clamp(min=0)
