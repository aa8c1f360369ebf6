"""What stays: the decisions of a sparsifier's policies, in inference and in training.

Legend: B batch, K pictures, I image tokens, N tokens, A answer tokens, C channels.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dynamic_llava import methods
from dynamic_llava.config import SparsityConfig
from dynamic_llava.core.record import Record
from dynamic_llava.core.report import Report
from dynamic_llava.core.sampled import Sampled
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
            scores_KI = self.image_method(attention_to(group, attention), self.noise).score(hidden_KIC)
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
        return self.text_method(self.noise).keep(hidden_BNC, ordinal_BN)

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
        record = getattr(self._last, "record", None)
        return None if record is None else Report(record)

    @property
    def sampled(self) -> Sampled | None:
        """The masks of this thread's last call, if that was a training pass."""
        return getattr(self._last, "sampled", None)

    def remember(self, record: Record, sampled: Sampled | None = None) -> None:
        """Make a call the last one of this thread."""
        self._last.record, self._last.sampled = record, sampled

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what belongs to a thread's last call: it is neither pickled nor copied."""
        return {name: value for name, value in self.__dict__.items() if name != "_last"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._last = threading.local()

    def image_method(self, attention_KI: Tensor | None, noise: Callable[[Tensor], Tensor]) -> methods.Policy:
        """Return what ranks image tokens, by ``attention_KI`` where it :attr:`reads_attention`."""
        return self._build(self.config.image_policy, self.text_predictor, noise, attention_KI)

    def text_method(self, noise: Callable[[Tensor], Tensor]) -> methods.Policy:
        """Return what decides on output tokens."""
        return self._build(self.config.text_policy, self.text_predictor, noise)

    def _build(
        self,
        name: str,
        predictor: TextPredictor,
        noise: Callable[[Tensor], Tensor],
        attention_KI: Tensor | None = None,
    ) -> methods.Policy:
        rates, config = self.train_rates, self.config
        return methods.build(name, config, self.image_predictor, predictor, noise, rates, attention_KI)


def same_size(pictures: Sequence[Tensor]) -> list[list[int]]:
    """Return the numbers of the pictures that have as many tokens as each other, in groups."""
    groups: dict[int, list[int]] = {}
    for number, picture_I in enumerate(pictures):
        groups.setdefault(len(picture_I), []).append(number)
    return list(groups.values())


def attention_to(group: Sequence[int], attention: Sequence[Tensor]) -> Tensor | None:
    """Return the attention to the tokens of each picture of a group, ``[K, I]``; None where there is none."""
    return torch.stack([attention[number] for number in group]) if attention else None
