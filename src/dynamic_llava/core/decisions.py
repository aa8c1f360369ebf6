"""What stays: the decisions of a sparsifier's policies, in inference and in training.

Legend: B batch, K pictures, I image tokens, N tokens, A answer tokens, C channels.
"""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dynamic_llava import methods
from dynamic_llava.config import SparsityConfig
from dynamic_llava.core.report import Report
from dynamic_llava.core.sampled import Sampled, Span
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
        self._last = threading.local()
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
        self, hidden_BNC: Tensor, pictures: Sequence[Tensor], attention: Sequence[Tensor]
    ) -> list[tuple[Tensor, Tensor | None]]:
        """Decide on the image tokens of each picture.

        Parameters
        ----------
        hidden_BNC
            What enters layer l.
        pictures
            Where the tokens of each picture lie in the flattened ``[B * N]`` input, int64 ``[I]`` each.
        attention
            The attention paid to the tokens of each picture; may be empty where :attr:`reads_attention` is
            False.

        Returns
        -------
        list
            Of each picture the decisions, bool ``[I]``, and the scores behind them, ``[I]``: None where all
            tokens stay, for then nothing is scored.
        """
        decided: list[tuple[Tensor, Tensor | None]] = [
            (torch.ones_like(picture_I, dtype=torch.bool), None) for picture_I in pictures
        ]
        for group in same_size(pictures):
            tokens = len(pictures[group[0]])
            if not self.drops_image_tokens(tokens):
                continue
            hidden_KIC = hidden_BNC.flatten(0, 1)[torch.stack([pictures[k] for k in group])]
            scores_KI = self._image_policy(_attention_to(group, attention), self.noise).score(hidden_KIC)
            kept_KI = top_k_mask(scores_KI, keep_count(tokens, self.config.image_keep_rate))
            for number, kept_I, scores_I in zip(group, kept_KI, scores_KI, strict=True):
                decided[number] = (kept_I, scores_I)
        return decided

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
        return self._text_policy(self.noise).keep(hidden_BNC, ordinal_BN)

    def keep_prompt_tokens(self, hidden_BNC: Tensor, ordinal_BN: Tensor) -> Tensor:
        """Return the bool decision ``[B, N]`` on prompt tokens, given their index within their question."""
        return self._prompt_policy(self.noise).keep(hidden_BNC, ordinal_BN)

    def sample(
        self,
        hidden_BNC: Tensor,
        pictures: Sequence[Tensor],
        answer_mask_BN: Tensor,
        prompt_mask_BN: Tensor | None,
        attention: Sequence[Tensor],
        noise: Callable[[Tensor], Tensor],
    ) -> Sampled:
        """Return the masks of a training pass.

        Image tokens and the tokens marked by ``answer_mask_BN`` and ``prompt_mask_BN`` get straight-through
        masks; answers and questions shorter than their minimal length and everything else get ones.
        ``pictures`` and ``attention`` are those of :meth:`keep_image_tokens`.
        """
        config = self.config
        answers = Span(answer_mask_BN, config.min_answer_length, config.text_keep_rate)
        text_mask_BN = torch.ones_like(answer_mask_BN, dtype=torch.float32)
        if config.sparsify_text:
            text_mask_BN = self._sample_span(hidden_BNC, answers, self._text_policy(noise))
        questions, prompt_mask = None, None
        if config.sparsify_prompt and prompt_mask_BN is not None:
            questions = Span(prompt_mask_BN, config.min_prompt_length, config.prompt_keep_rate)
            prompt_mask = self._sample_span(hidden_BNC, questions, self._prompt_policy(noise))
        image_masks: list[Tensor] = [
            hidden_BNC.new_ones(len(picture_I), dtype=torch.float32) for picture_I in pictures
        ]
        if config.sparsify_image:
            for group in same_size(pictures):
                hidden_KIC = hidden_BNC.flatten(0, 1)[torch.stack([pictures[k] for k in group])]
                policy = self._image_policy(_attention_to(group, attention), noise)
                mask_KI = policy.train_image_mask(hidden_KIC, config.image_keep_rate, self.tau).float()
                for number, mask_I in zip(group, mask_KI, strict=True):
                    image_masks[number] = mask_I
        rate = config.image_keep_rate if config.sparsify_image else None
        return Sampled(text_mask_BN, answers, prompt_mask, questions, pictures, image_masks, rate)

    def ratio_loss(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return the image, text and prompt penalty of this thread's last training pass.

        They come before ``ratio_weight``: mean over pictures, and over rows, of the squared difference
        between the target keep rate and the mean of the mask; rows with a short answer (question) count as 0.

        Raises
        ------
        ValueError
            If the last call was no masked pass in training mode.
        """
        if self.sampled is None:
            raise ValueError(
                "ratio_loss needs a training pass first: model.train(), then model(..., answer_mask=...)"
            )
        return self.sampled.ratio_losses(self.config.sparsify_text)

    @property
    def report(self) -> Report | None:
        """What this thread's last call kept."""
        return getattr(self._last, "report", None)

    @property
    def sampled(self) -> Sampled | None:
        """The masks of this thread's last call, if that was a training pass."""
        return getattr(self._last, "sampled", None)

    def remember(self, report: Report, sampled: Sampled | None = None) -> None:
        """Make a call the last one of this thread."""
        self._last.report, self._last.sampled = report, sampled

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what belongs to a thread's last call: it is neither pickled nor copied."""
        return {name: value for name, value in self.__dict__.items() if name != "_last"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._last = threading.local()

    def _sample_span(self, hidden_BNC: Tensor, span: Span, policy: methods.Policy) -> Tensor:
        """Mask of one droppable span a row, float32 ``[B, N]``; 1 outside and in short spans."""
        index_BA, valid_BA = right_align(span.mask_BN)
        ordinal_BA = ordinals(span.mask_BN).gather(1, index_BA)
        hidden_BAC = gather_tokens(hidden_BNC, index_BA)
        mask_BA = policy.train_text_mask(hidden_BAC, ordinal_BA, valid_BA, self.tau).float()
        droppable_BA = valid_BA & span.is_long_B[:, None]
        ones_BN = torch.ones_like(span.mask_BN, dtype=torch.float32)
        return ones_BN.scatter(1, index_BA, torch.where(droppable_BA, mask_BA, 1.0))

    def _image_policy(self, attention_KI: Tensor | None, noise: Callable[[Tensor], Tensor]) -> methods.Policy:
        config = self.config
        return methods.build(
            config.image_policy,
            config,
            self.image_predictor,
            self.text_predictor,
            noise,
            self.train_rates,
            attention_KI,
        )

    def _text_policy(self, noise: Callable[[Tensor], Tensor]) -> methods.Policy:
        config = self.config
        return methods.build(
            config.text_policy, config, self.image_predictor, self.text_predictor, noise, self.train_rates
        )

    def _prompt_policy(self, noise: Callable[[Tensor], Tensor]) -> methods.Policy:
        """Return the text policy at the rate of prompt tokens, with the third predictor."""
        name, predictor = self.config.text_policy, self.prompt_predictor
        if predictor is None and name == "learned":
            raise ValueError(
                "sparsify_prompt is True, but this sparsifier was made without it and has no prompt predictor"
            )
        config = dataclasses.replace(
            self.config, text_keep_rate=self.config.prompt_keep_rate, text_margins=()
        )
        return methods.build(name, config, self.image_predictor, predictor or self.text_predictor, noise)


def same_size(pictures: Sequence[Tensor]) -> list[list[int]]:
    """Return the numbers of the pictures that have as many tokens as each other, in groups."""
    groups: dict[int, list[int]] = {}
    for number, picture_I in enumerate(pictures):
        groups.setdefault(len(picture_I), []).append(number)
    return list(groups.values())


def _attention_to(group: Sequence[int], attention: Sequence[Tensor]) -> Tensor | None:
    return torch.stack([attention[number] for number in group]) if attention else None
