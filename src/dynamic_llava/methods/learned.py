"""Dynamic-LLaVA: two predictors decide (paper, sections 3.2 and 3.3)."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from dynamic_llava.methods.base import Policy
from dynamic_llava.methods.gumbel import at_rate, straight_through
from dynamic_llava.methods.predictors import ImagePredictor, TextPredictor


class TrainRates(NamedTuple):
    """Keep rates, each in (0, 1), of image tokens and of output tokens."""

    image: float
    text: float


class LearnedPolicy(Policy):
    """Rank image tokens and decide on output tokens by the margin of their keep logit.

    Parameters
    ----------
    image_predictor, text_predictor
        The networks that return keep/drop logits.
    noise
        Draws the Exp(1) noise of training in the shape of the logits it is given.
    text_threshold
        Keep margin above which an output token stays.
    train_rates
        Keep rates that training samples at, or None, which leaves them to the ratio loss. With them, the
        temperature also sharpens what is sampled: no ratio loss drives the logits apart.
    """

    def __init__(
        self,
        image_predictor: ImagePredictor,
        text_predictor: TextPredictor,
        noise: Callable[[Tensor], Tensor],
        text_threshold: float,
        train_rates: TrainRates | None,
    ) -> None:
        self.image_predictor = image_predictor
        self.text_predictor = text_predictor
        self.noise = noise
        self.text_threshold = text_threshold
        self.train_rates = train_rates

    def score(self, hidden_KIC: Tensor) -> Tensor:
        """Return the log-probability of keep: the ranking of the margin, not of the raw keep logit."""
        keep_KI, drop_KI = self.image_predictor(hidden_KIC).float().unbind(-1)
        return F.logsigmoid(keep_KI - drop_KI)  # log_softmax would round confident scores to one value

    def keep(self, hidden_BNC: Tensor, ordinal_BN: Tensor) -> Tensor:
        """Keep where the keep logit is greater by more than the threshold."""
        keep_BN, drop_BN = self.text_predictor(hidden_BNC).unbind(-1)
        return keep_BN > drop_BN + self.text_threshold

    def train_image_mask(self, hidden_KIC: Tensor, rate: float, tau: float) -> Tensor:
        """Sample by the straight-through Gumbel softmax; ``rate`` is left to the ratio loss."""
        logits_KI2 = self.image_predictor(hidden_KIC)
        if self.train_rates is not None:
            every_KI = torch.ones_like(logits_KI2[..., 0], dtype=torch.bool)
            logits_KI2, tau = at_rate(logits_KI2 / tau, self.train_rates.image, every_KI), 1.0
        return straight_through(logits_KI2, tau, self.noise)

    def train_text_mask(self, hidden_BNC: Tensor, ordinal_BN: Tensor, valid_BN: Tensor, tau: float) -> Tensor:
        """Sample by the straight-through Gumbel softmax."""
        logits_BN2 = self.text_predictor(hidden_BNC)
        if self.train_rates is not None:
            logits_BN2, tau = at_rate(logits_BN2 / tau, self.train_rates.text, valid_BN), 1.0
        return straight_through(logits_BN2, tau, self.noise)
