"""Output tokens stay by chance: the baseline that every method must beat."""

from __future__ import annotations

from torch import Tensor

from dynamic_llava.methods.base import OutputMethod, Outputs
from dynamic_llava.methods.chance import TEXT_STREAM, hashed_uniform


class Random(OutputMethod):
    """Keep the same tokens for the same seed, whatever else is in the batch."""

    def keep(self, outputs: Outputs) -> Tensor:
        """Keep each with the probability of the rate."""
        return hashed_uniform(outputs.ordinal_BN, outputs.seed, TEXT_STREAM) < outputs.rate
