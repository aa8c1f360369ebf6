"""What stays: the decisions of a sparsifier's policies, in inference and in training.

Legend: B batch, K pictures, I image tokens, N tokens, A answer tokens, C channels.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dynamic_llava import policies
from dynamic_llava.config import SparsityConfig
from dynamic_llava.passes import ordinals
from dynamic_llava.predictors import ImagePredictor, TextPredictor
from dynamic_llava.report import Report
from dynamic_llava.selection import gather_tokens, keep_count, right_align, top_k_mask


class Decisions(nn.Module):
    """Both predictors and the policies that use them or do without.

    Parameters
    ----------
    config
        What to drop and how much; read anew at every call.
    hidden_size
        Width C of the decoder.
    """

    def __init__(self, config: SparsityConfig, hidden_size: int) -> None:
        super().__init__()
        self.config = config
        self.hidden_size = hidden_size
        self.tau = 1.0
        self.report: Report | None = None
        self.image_predictor = ImagePredictor(
            hidden_size, config.d_model, config.nhead, config.dim_feedforward, config.num_layers
        )
        self.text_predictor = TextPredictor(hidden_size, config.d_model)

    def keep_image_tokens(self, hidden_KIC: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return the bool decision ``[K, I]`` on each picture's image tokens, and the scores behind it.

        The scores are None where all tokens stay, for then nothing is scored.
        """
        pictures, tokens, _ = hidden_KIC.shape
        if not self.drops_image_tokens(tokens):
            return torch.ones(pictures, tokens, dtype=torch.bool, device=hidden_KIC.device), None
        scores_KI = self._policy(self.config.image_policy).score(hidden_KIC)
        return top_k_mask(scores_KI, keep_count(tokens, self.config.image_keep_rate)), scores_KI

    def drops_image_tokens(self, tokens: int) -> bool:
        """Return whether a picture of ``tokens`` image tokens loses any."""
        return self.config.sparsify_image and keep_count(tokens, self.config.image_keep_rate) < tokens

    def keep_text_tokens(self, hidden_BNC: Tensor, ordinal_BN: Tensor) -> Tensor:
        """Return the bool decision ``[B, N]`` on output tokens, given their index within their answer."""
        return self._policy(self.config.text_policy).keep(hidden_BNC, ordinal_BN)

    def training_policy(
        self, hidden_BNC: Tensor, image_positions_KI: Tensor | None, answer_mask_BN: Tensor, report: Report
    ) -> Tensor:
        """Return the weight of each key in training, float32 ``[B, N]``; record its parts in ``report``.

        Image tokens and the tokens marked by ``answer_mask_BN`` get straight-through masks; answers shorter
        than ``min_answer_length`` and everything else get ones.
        """
        config = self.config
        policy_BN = report.text_mask_BN = self._train_text(hidden_BNC, answer_mask_BN)
        report.answer_mask_BN = answer_mask_BN
        if image_positions_KI is None:
            return policy_BN
        hidden_KIC = hidden_BNC.flatten(0, 1)[image_positions_KI]
        mask_KI = hidden_KIC.new_ones(hidden_KIC.shape[:2], dtype=torch.float32)
        if config.sparsify_image:
            policy = self._policy(config.image_policy)
            mask_KI = policy.train_image_mask(hidden_KIC, config.image_keep_rate, self.tau).float()
        report.image_mask_BI = mask_KI
        flat = policy_BN.flatten().scatter(0, image_positions_KI.flatten(), mask_KI.flatten())
        return flat.view_as(policy_BN)

    def ratio_loss(self) -> tuple[Tensor, Tensor]:
        """Return the image and the text penalty of the last training pass, before ``ratio_weight``.

        Mean over pictures, and over rows, of the squared difference between the target keep rate and the mean
        of the mask; rows with a short answer count as 0.

        Raises
        ------
        ValueError
            If the last call was no masked pass in training mode.
        """
        report, config = self.report, self.config
        if report is None or report.text_mask_BN is None or report.answer_mask_BN is None:
            raise ValueError(
                "ratio_loss needs a training pass first: model.train(), then model(..., answer_mask=...)"
            )
        image_loss = text_loss = report.text_mask_BN.new_zeros(())
        if config.sparsify_image and report.image_mask_BI is not None:
            image_loss = (config.image_keep_rate - report.image_mask_BI.mean(-1)).square().mean()
        if config.sparsify_text:
            length_B = report.answer_mask_BN.sum(-1)
            kept_B = (report.text_mask_BN * report.answer_mask_BN).sum(-1) / length_B.clamp(min=1)
            penalty_B = (config.text_keep_rate - kept_B).square()
            text_loss = (penalty_B * self._is_long(report.answer_mask_BN)).mean()
        return image_loss, text_loss

    def _train_text(self, hidden_BNC: Tensor, answer_mask_BN: Tensor) -> Tensor:
        policy_BN = torch.ones_like(answer_mask_BN, dtype=torch.float32)
        if not self.config.sparsify_text:
            return policy_BN
        index_BA, valid_BA = right_align(answer_mask_BN)
        policy = self._policy(self.config.text_policy)
        ordinal_BA = ordinals(answer_mask_BN).gather(1, index_BA)
        mask_BA = policy.train_text_mask(gather_tokens(hidden_BNC, index_BA), ordinal_BA, self.tau).float()
        droppable_BA = valid_BA & self._is_long(answer_mask_BN)[:, None]
        return policy_BN.scatter(1, index_BA, torch.where(droppable_BA, mask_BA, 1.0))

    def _is_long(self, answer_mask_BN: Tensor) -> Tensor:
        return answer_mask_BN.sum(-1) >= max(self.config.min_answer_length, 1)

    def _policy(self, name: str) -> policies.Policy:
        return policies.build(name, self.config, self.image_predictor, self.text_predictor)
