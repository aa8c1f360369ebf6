"""Dynamic-LLaVA: a small transformer ranks the image tokens of a picture (paper, section 3.2)."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dynamic_llava.config import SparsityConfig
from dynamic_llava.methods.base import Draw, ImageMethod, Pictures
from dynamic_llava.methods.gumbel import at_rate, straight_through
from dynamic_llava.methods.predictors import ImagePredictor, image_predictor_flops


class Learned(ImageMethod):
    """Rank by the margin of the predictor's keep logit."""

    needs_predictor = True

    def new_predictor(self, config: SparsityConfig, hidden_size: int) -> nn.Module:
        """Return the image predictor in the sizes of the config."""
        return ImagePredictor(
            hidden_size, config.d_model, config.nhead, config.dim_feedforward, config.num_layers
        )

    def score(self, pictures: Pictures) -> Tensor:
        """Return the log-probability of keep: the ranking of the margin, not of the raw keep logit."""
        keep_KI, drop_KI = _logits(pictures).float().unbind(-1)
        return F.logsigmoid(keep_KI - drop_KI)  # log_softmax would round confident scores to one value

    def weigh(self, pictures: Pictures, draw: Draw) -> Tensor:
        """Sample by the straight-through Gumbel softmax; the keep rate is left to the ratio loss.

        At a rate that was drawn, the temperature also sharpens what is sampled: no ratio loss drives the
        logits apart.
        """
        logits_KI2, tau = _logits(pictures), draw.tau
        if draw.rate is not None:
            every_KI = torch.ones_like(logits_KI2[..., 0], dtype=torch.bool)
            logits_KI2, tau = at_rate(logits_KI2 / tau, draw.rate, every_KI), 1.0
        return straight_through(logits_KI2, tau, draw.noise)

    def flops(self, config: SparsityConfig, hidden_size: int, tokens: float) -> float:
        """Return the FLOPs of the predictor."""
        return image_predictor_flops(config, hidden_size, tokens)


def _logits(pictures: Pictures) -> Tensor:
    return cast(nn.Module, pictures.predictor)(pictures.hidden_KIC)
