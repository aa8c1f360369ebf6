"""Dynamic-LLaVA: two predictors decide (paper, sections 3.2 and 3.3)."""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

from dynamic_llava.policies.base import Policy
from dynamic_llava.predictors import ImagePredictor, TextPredictor
from dynamic_llava.selection import straight_through


class LearnedPolicy(Policy):
    """Rank image tokens and decide on output tokens by the margin of their keep logit.

    Parameters
    ----------
    image_predictor, text_predictor
        The networks that return keep/drop logits.
    noise
        Draws the Exp(1) noise of training in the shape of the logits it is given.
    """

    def __init__(
        self,
        image_predictor: ImagePredictor,
        text_predictor: TextPredictor,
        noise: Callable[[Tensor], Tensor],
    ) -> None:
        self.image_predictor = image_predictor
        self.text_predictor = text_predictor
        self.noise = noise

    def score(self, hidden_KIC: Tensor) -> Tensor:
        """Return the log-probability of keep: the ranking of the margin, not of the raw keep logit."""
        keep_KI, drop_KI = self.image_predictor(hidden_KIC).float().unbind(-1)
        return F.logsigmoid(keep_KI - drop_KI)  # log_softmax would round confident scores to one value

    def keep(self, hidden_BNC: Tensor, ordinal_BN: Tensor) -> Tensor:
        """Keep where the keep logit is strictly greater."""
        keep_BN, drop_BN = self.text_predictor(hidden_BNC).unbind(-1)
        return keep_BN > drop_BN

    def train_image_mask(self, hidden_KIC: Tensor, rate: float, tau: float) -> Tensor:
        """Sample by the straight-through Gumbel softmax; the ratio loss, not ``rate``, sets the count."""
        return straight_through(self.image_predictor(hidden_KIC), tau, self.noise)

    def train_text_mask(self, hidden_BNC: Tensor, ordinal_BN: Tensor, tau: float) -> Tensor:
        """Sample by the straight-through Gumbel softmax."""
        return straight_through(self.text_predictor(hidden_BNC), tau, self.noise)
