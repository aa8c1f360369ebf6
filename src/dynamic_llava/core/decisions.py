"""What stays: the decisions of a sparsifier's policies, in inference and in training.

Legend: B batch, K pictures, I image tokens, N tokens, A answer tokens, C channels.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor, nn

from dynamic_llava import methods
from dynamic_llava.config import SparsityConfig
from dynamic_llava.core.report import Report, Span
from dynamic_llava.core.view import gather_tokens, ordinals, right_align
from dynamic_llava.methods.gumbel import exponential_noise
from dynamic_llava.methods.predictors import ImagePredictor, TextPredictor
from dynamic_llava.methods.top_k import keep_count, top_k_mask


class Decisions(nn.Module):
    """The predictors and the policies that use them or do without.

    Parameters
    ----------
    config
        What to drop and how much; read anew at every call.
    hidden_size
        Width C of the decoder.

    Attributes
    ----------
    train_rates
        Keep rates that the learned policy's training samples at; None leaves them to :meth:`ratio_loss`.
    noise
        Draws the Exp(1) noise of training in the shape of logits; in a pass first for output tokens, then for
        prompt tokens (both aligned to the right), then for image tokens.
    """

    def __init__(self, config: SparsityConfig, hidden_size: int) -> None:
        super().__init__()
        self.config = config
        self.hidden_size = hidden_size
        self.tau = 1.0
        self.train_rates: methods.TrainRates | None = None
        self.noise: Callable[[Tensor], Tensor] = exponential_noise
        self.report: Report | None = None
        self.image_predictor = ImagePredictor(
            hidden_size, config.d_model, config.nhead, config.dim_feedforward, config.num_layers
        )
        self.text_predictor = TextPredictor(hidden_size, config.d_model)
        self.make_prompt_predictor(config.sparsify_prompt)

    def make_prompt_predictor(self, wanted: bool) -> None:
        """Have a third predictor, of prompt tokens, or none; ``sparsify_prompt`` at the start decides."""
        hidden_size, width = self.hidden_size, self.config.d_model
        self.prompt_predictor = TextPredictor(hidden_size, width) if wanted else None

    def keep_image_tokens(
        self, hidden_KIC: Tensor, attention_KI: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """Return the bool decision ``[K, I]`` on each picture's image tokens, and the scores behind it.

        The scores are None where all tokens stay, for then nothing is scored; ``attention_KI`` may be None
        where :attr:`reads_attention` is False.
        """
        pictures, tokens, _ = hidden_KIC.shape
        if not self.drops_image_tokens(tokens):
            return torch.ones(pictures, tokens, dtype=torch.bool, device=hidden_KIC.device), None
        scores_KI = self._image_policy(attention_KI).score(hidden_KIC)
        return top_k_mask(scores_KI, keep_count(tokens, self.config.image_keep_rate)), scores_KI

    def drops_image_tokens(self, tokens: int) -> bool:
        """Return whether a picture of ``tokens`` image tokens loses any."""
        return self.config.sparsify_image and keep_count(tokens, self.config.image_keep_rate) < tokens

    @property
    def reads_attention(self) -> bool:
        """Whether image tokens are ranked by the attention that the last dense layer pays them."""
        return self.config.sparsify_image and methods.reads_attention(self.config.image_policy)

    @property
    def evicting(self) -> methods.EvictingPolicy | None:
        """The policy of output tokens if it gives up earlier ones, else None."""
        config = self.config
        return methods.evicting(config.text_policy, config.text_keep_rate) if config.sparsify_text else None

    def keep_text_tokens(self, hidden_BNC: Tensor, ordinal_BN: Tensor) -> Tensor:
        """Return the bool decision ``[B, N]`` on output tokens, given their index within their answer."""
        return self._text_policy().keep(hidden_BNC, ordinal_BN)

    def keep_prompt_tokens(self, hidden_BNC: Tensor, ordinal_BN: Tensor) -> Tensor:
        """Return the bool decision ``[B, N]`` on prompt tokens, given their index within their question."""
        return self._prompt_policy().keep(hidden_BNC, ordinal_BN)

    def training_policy(
        self,
        hidden_BNC: Tensor,
        image_positions_KI: Tensor | None,
        answer_mask_BN: Tensor,
        prompt_mask_BN: Tensor | None,
        attention_KI: Tensor | None,
        report: Report,
    ) -> Tensor:
        """Return the weight of each key in training, float32 ``[B, N]``; record its parts in ``report``.

        Image tokens and the tokens marked by ``answer_mask_BN`` and ``prompt_mask_BN`` get straight-through
        masks; answers and questions shorter than their minimal length and everything else get ones.
        """
        config = self.config
        policy_BN = torch.ones_like(answer_mask_BN, dtype=torch.float32)
        report.answer_span = Span(answer_mask_BN, config.min_answer_length, config.text_keep_rate)
        if config.sparsify_text:
            policy_BN = self._train_span(hidden_BNC, report.answer_span, self._text_policy())
        report.text_mask_BN = policy_BN
        if config.sparsify_prompt and prompt_mask_BN is not None:
            report.prompt_span = Span(prompt_mask_BN, config.min_prompt_length, config.prompt_keep_rate)
            report.prompt_mask_BN = self._train_span(hidden_BNC, report.prompt_span, self._prompt_policy())
            policy_BN = policy_BN * report.prompt_mask_BN
        if image_positions_KI is None:
            return policy_BN
        hidden_KIC = hidden_BNC.flatten(0, 1)[image_positions_KI]
        mask_KI = hidden_KIC.new_ones(hidden_KIC.shape[:2], dtype=torch.float32)
        if config.sparsify_image:
            policy = self._image_policy(attention_KI)
            mask_KI = policy.train_image_mask(hidden_KIC, config.image_keep_rate, self.tau).float()
        report.image_mask_BI = mask_KI
        flat = policy_BN.flatten().scatter(0, image_positions_KI.flatten(), mask_KI.flatten())
        return flat.view_as(policy_BN)

    def ratio_loss(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return the image, text and prompt penalty of the last training pass, before ``ratio_weight``.

        Mean over pictures, and over rows, of the squared difference between the target keep rate and the mean
        of the mask; rows with a short answer (question) count as 0.

        Raises
        ------
        ValueError
            If the last call was no masked pass in training mode.
        """
        report, config = self.report, self.config
        if report is None or report.text_mask_BN is None or report.answer_span is None:
            raise ValueError(
                "ratio_loss needs a training pass first: model.train(), then model(..., answer_mask=...)"
            )
        image_loss = text_loss = prompt_loss = report.text_mask_BN.new_zeros(())
        if config.sparsify_image and report.image_mask_BI is not None:
            image_loss = (config.image_keep_rate - report.image_mask_BI.mean(-1)).square().mean()
        if config.sparsify_text:
            text_loss = report.answer_span.penalty(report.text_mask_BN)
        if report.prompt_mask_BN is not None and report.prompt_span is not None:
            prompt_loss = report.prompt_span.penalty(report.prompt_mask_BN)
        return image_loss, text_loss, prompt_loss

    def _train_span(self, hidden_BNC: Tensor, span: Span, policy: methods.Policy) -> Tensor:
        """Mask of one droppable span a row, float32 ``[B, N]``; 1 outside and in short spans."""
        index_BA, valid_BA = right_align(span.mask_BN)
        ordinal_BA = ordinals(span.mask_BN).gather(1, index_BA)
        hidden_BAC = gather_tokens(hidden_BNC, index_BA)
        mask_BA = policy.train_text_mask(hidden_BAC, ordinal_BA, valid_BA, self.tau).float()
        droppable_BA = valid_BA & span.is_long_B[:, None]
        ones_BN = torch.ones_like(span.mask_BN, dtype=torch.float32)
        return ones_BN.scatter(1, index_BA, torch.where(droppable_BA, mask_BA, 1.0))

    def _image_policy(self, attention_KI: Tensor | None) -> methods.Policy:
        config = self.config
        return self._policy(config.image_policy, config, self.text_predictor, self.train_rates, attention_KI)

    def _text_policy(self) -> methods.Policy:
        return self._policy(self.config.text_policy, self.config, self.text_predictor, self.train_rates)

    def _prompt_policy(self) -> methods.Policy:
        """Return the text policy at the rate of prompt tokens, with the third predictor."""
        name, predictor = self.config.text_policy, self.prompt_predictor
        if predictor is None and name == "learned":
            raise ValueError(
                "sparsify_prompt is True, but this sparsifier was made without it and has no prompt predictor"
            )
        config = dataclasses.replace(
            self.config, text_keep_rate=self.config.prompt_keep_rate, text_margins=()
        )
        return self._policy(name, config, predictor or self.text_predictor, None)

    def _policy(
        self,
        name: str,
        config: SparsityConfig,
        predictor: TextPredictor,
        train_rates: methods.TrainRates | None,
        attention_KI: Tensor | None = None,
    ) -> methods.Policy:
        return methods.build(
            name, config, self.image_predictor, predictor, self.noise, train_rates, attention_KI
        )
