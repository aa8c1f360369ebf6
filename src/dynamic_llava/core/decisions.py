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
from dynamic_llava.methods.base import (
    EvictingMethod,
    ImageMethod,
    Method,
    OutputMethod,
    Outputs,
    Pictures,
    TrainRates,
)
from dynamic_llava.methods.gumbel import exponential_noise
from dynamic_llava.methods.top_k import keep_count, top_k_mask


class Decisions(nn.Module):
    """The methods that decide, and the predictors of those that need one.

    Parameters
    ----------
    config
        What to drop and how much; read anew at every call.
    hidden_size
        Width C of the decoder.

    Attributes
    ----------
    train_rates
        Keep rates that training samples at; None leaves them to :meth:`ratio_loss`.
    noise
        Draws the Exp(1) noise of training in the shape of logits; in a pass first for output tokens, then for
        prompt tokens (both aligned to the right), then for image tokens.
    image_predictor, text_predictor, prompt_predictor
        Networks of the methods that need one, else None; the third, of prompt tokens, only where
        ``sparsify_prompt`` is set at the start.
    """

    _image: tuple[Any, dict[str, Any]]
    _text: tuple[Any, dict[str, Any]]
    image_predictor: nn.Module | None
    text_predictor: nn.Module | None
    prompt_predictor: nn.Module | None

    def __init__(self, config: SparsityConfig, hidden_size: int) -> None:
        super().__init__()
        self.config = config
        self.hidden_size = hidden_size
        self.tau = 1.0
        self.train_rates: TrainRates | None = None
        self.noise: Callable[[Tensor], Tensor] = exponential_noise
        self._last = threading.local()
        self._image = self._text = ("", {})
        self.image_predictor = _new_predictor(self.image_method, config, hidden_size)
        self.text_predictor = _new_predictor(self.text_method, config, hidden_size)
        self.make_prompt_predictor(config.sparsify_prompt)

    def make_prompt_predictor(self, wanted: bool) -> None:
        """Have a third predictor, of prompt tokens, or none; ``sparsify_prompt`` at the start decides."""
        made = _new_predictor(self.text_method, self.config, self.hidden_size) if wanted else None
        self.prompt_predictor = made

    @property
    def image_method(self) -> ImageMethod:
        """What ranks image tokens; made anew where the config asks for another one."""
        config = self.config
        if self._image != (config.image_policy, config.image_options):
            self._image = config.image_policy, dict(config.image_options)
            self._image_method = methods.image_method(*self._image)
        return self._image_method

    @property
    def text_method(self) -> OutputMethod:
        """What decides on output tokens, and on prompt tokens under ``sparsify_prompt``."""
        config = self.config
        if self._text != (config.text_policy, config.text_options):
            self._text = config.text_policy, dict(config.text_options)
            self._text_method = methods.output_method(*self._text)
        return self._text_method

    def check_methods(self) -> None:
        """Raise ``ValueError`` if a method of the config is unknown, or lacks its predictor."""
        image, text = self.image_method, self.text_method
        for setting, method, predictor in (
            ("image_policy", image, self.image_predictor),
            ("text_policy", text, self.text_predictor),
            ("sparsify_prompt", text if self.config.sparsify_prompt else None, self.prompt_predictor),
        ):
            if method is not None and method.needs_predictor and predictor is None:
                value = getattr(self.config, setting)
                raise ValueError(
                    f"{setting} is {value!r}, but this sparsifier was made without it and has no predictor "
                    f"for it: make a Sparsifier with {setting}={value!r}, or load one that was trained so"
                )

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
            scores_KI = self.image_method.score(self.pictures(hidden_KIC, attention_to(group, attention)))
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
        return self.config.sparsify_image and self.image_method.reads_attention

    @property
    def evicting(self) -> EvictingMethod | None:
        """The method of output tokens if it gives up earlier ones, else None."""
        method = self.text_method if self.config.sparsify_text else None
        return method if isinstance(method, EvictingMethod) else None

    def keep_text_tokens(self, hidden_BNC: Tensor, ordinal_BN: Tensor) -> Tensor:
        """Return the bool decision ``[B, N]`` on output tokens, given their index within their answer."""
        return self.text_method.keep(self.outputs(hidden_BNC, ordinal_BN))

    def pictures(self, hidden_KIC: Tensor, attention_KI: Tensor | None) -> Pictures:
        """Return pictures as their method is asked about them."""
        config = self.config
        return Pictures(hidden_KIC, config.image_keep_rate, config.seed, self.image_predictor, attention_KI)

    def outputs(self, hidden_BNC: Tensor, ordinal_BN: Tensor) -> Outputs:
        """Return output tokens as their method is asked about them."""
        rate, seed, threshold = self.config.text_keep_rate, self.config.seed, self.config.text_threshold
        return Outputs(hidden_BNC, ordinal_BN, rate, seed, self.text_predictor, threshold)

    def questions(self, hidden_BNC: Tensor, ordinal_BN: Tensor) -> Outputs:
        """Return prompt tokens as the method of output tokens is asked about them."""
        rate, seed = self.config.prompt_keep_rate, self.config.seed
        return Outputs(hidden_BNC, ordinal_BN, rate, seed, self.prompt_predictor)

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


def _new_predictor(method: Method, config: SparsityConfig, hidden_size: int) -> nn.Module | None:
    return method.new_predictor(config, hidden_size) if method.needs_predictor else None


def same_size(pictures: Sequence[Tensor]) -> list[list[int]]:
    """Return the numbers of the pictures that have as many tokens as each other, in groups."""
    groups: dict[int, list[int]] = {}
    for number, picture_I in enumerate(pictures):
        groups.setdefault(len(picture_I), []).append(number)
    return list(groups.values())


def attention_to(group: Sequence[int], attention: Sequence[Tensor]) -> Tensor | None:
    """Return the attention to the tokens of each picture of a group, ``[K, I]``; None where there is none."""
    return torch.stack([attention[number] for number in group]) if attention else None
