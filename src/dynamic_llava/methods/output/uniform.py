"""Evenly spaced output tokens stay."""

from __future__ import annotations

from torch import Tensor

from dynamic_llava.methods.base import OutputMethod, Outputs
from dynamic_llava.methods.spacing import evenly_spaced


class Uniform(OutputMethod):
    """Keep tokens at a fixed stride, counted from the start of the answer."""

    def keep(self, outputs: Outputs) -> Tensor:
        """Keep at the stride."""
        return evenly_spaced(outputs.ordinal_BN, outputs.rate)
