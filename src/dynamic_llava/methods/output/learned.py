"""Dynamic-LLaVA: a small MLP decides on each output token by its own hidden state (paper, section 3.2)."""

from __future__ import annotations

from typing import cast

from torch import Tensor, nn

from dynamic_llava.config import SparsityConfig
from dynamic_llava.methods.base import Draw, OutputMethod, Outputs
from dynamic_llava.methods.gumbel import at_rate, straight_through
from dynamic_llava.methods.predictors import TextPredictor, text_predictor_flops


class Learned(OutputMethod):
    """Keep where the predictor's keep logit is greater than the other by more than the threshold."""

    needs_predictor = True
    has_dial = True

    def new_predictor(self, config: SparsityConfig, hidden_size: int) -> nn.Module:
        """Return the output predictor in the sizes of the config."""
        return TextPredictor(hidden_size, config.d_model)

    def keep(self, outputs: Outputs) -> Tensor:
        """Decide by the margin."""
        keep_BN, drop_BN = _logits(outputs).unbind(-1)
        return keep_BN > drop_BN + outputs.threshold

    def weigh(self, outputs: Outputs, valid_BN: Tensor, draw: Draw) -> Tensor:
        """Sample by the straight-through Gumbel softmax, at the rate that was drawn or the logits' own."""
        logits_BN2, tau = _logits(outputs), draw.tau
        if draw.rate is not None:
            logits_BN2, tau = at_rate(logits_BN2 / tau, draw.rate, valid_BN), 1.0
        return straight_through(logits_BN2, tau, draw.noise)

    def flops(self, config: SparsityConfig, hidden_size: int) -> float:
        """Return the FLOPs of the predictor."""
        return text_predictor_flops(config, hidden_size)


def _logits(outputs: Outputs) -> Tensor:
    return cast(nn.Module, outputs.predictor)(outputs.hidden_BNC)
