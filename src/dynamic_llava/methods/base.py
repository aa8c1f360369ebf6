"""What a method of dropping tokens must answer; each method is one file of ``image/`` or ``output/``.

A method is a frozen dataclass: its fields are its settings, which ``image_options`` and ``text_options`` of
:class:`~dynamic_llava.SparsityConfig` fill. All else comes with the tokens that it is asked about.

Legend: B batch, K pictures, I image tokens, N tokens, S slots of the cache, T output tokens, C channels.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from dynamic_llava.config import SparsityConfig
from dynamic_llava.methods.top_k import keep_count, top_k_mask


class Pictures(NamedTuple):
    """Pictures of as many tokens as each other, as they enter layer l.

    Attributes
    ----------
    hidden_KIC
        Hidden states of their tokens.
    rate
        Share to keep, in (0, 1].
    seed
        That of the config.
    predictor
        What the method's :meth:`~Method.new_predictor` made; None for a method without one.
    attention_KI
        The attention that the last prompt token pays them in the last dense layer, mean over heads; None for
        a method that does not read it.
    """

    hidden_KIC: Tensor
    rate: float
    seed: int = 0
    predictor: nn.Module | None = None
    attention_KI: Tensor | None = None


class Outputs(NamedTuple):
    """Output tokens (or prompt tokens, under ``sparsify_prompt``) as they enter layer l.

    Attributes
    ----------
    hidden_BNC
        Hidden states.
    ordinal_BN
        Index of each within its answer, int64; 0 is the first generated token.
    rate
        Share to keep, in (0, 1].
    seed
        That of the config.
    predictor
        What the method's :meth:`~Method.new_predictor` made; None for a method without one.
    threshold
        Margin above which a predictor's decision is to keep.
    """

    hidden_BNC: Tensor
    ordinal_BN: Tensor
    rate: float
    seed: int = 0
    predictor: nn.Module | None = None
    threshold: float = 0.0


class Draw(NamedTuple):
    """How training samples masks.

    Attributes
    ----------
    tau
        Temperature of the Gumbel softmax.
    noise
        Draws Exp(1) noise in the shape of the logits it is given.
    rate
        Share that the samples keep on average, in (0, 1); None leaves it to the ratio loss.
    """

    tau: float
    noise: Callable[[Tensor], Tensor]
    rate: float | None = None


class TrainRates(NamedTuple):
    """Keep rates, each in (0, 1), of image tokens and of output tokens."""

    image: float
    text: float


@dataclass(frozen=True)
class Method:
    """What methods for image tokens and for output tokens have in common."""

    needs_predictor: ClassVar[bool] = False

    @classmethod
    def needs(cls) -> Iterator[str]:
        """Yield in words what it asks for beside the tokens."""
        if cls.needs_predictor:
            yield "a trained predictor"

    def new_predictor(self, config: SparsityConfig, hidden_size: int) -> nn.Module:
        """Return a new network, where :attr:`needs_predictor`; trained and saved with the sparsifier."""
        raise NotImplementedError(f"{type(self).__name__} needs no predictor")


class ImageMethod(Method, ABC):
    """Ranks the image tokens of a picture: a new method has a :meth:`score`."""

    reads_attention: ClassVar[bool] = False

    @classmethod
    def needs(cls) -> Iterator[str]:
        """Yield in words what it asks for beside the tokens."""
        yield from super().needs()
        if cls.reads_attention:
            yield "attention weights"

    @abstractmethod
    def score(self, pictures: Pictures) -> Tensor:
        """Return scores ``[K, I]``; the ``int(I * rate)`` highest of each picture are kept, at least one."""

    def weigh(self, pictures: Pictures, draw: Draw) -> Tensor:
        """Return the 0/1 mask ``[K, I]`` that training weighs keys with: by default, the decision."""
        scores_KI = self.score(pictures)
        kept_KI = top_k_mask(scores_KI, keep_count(scores_KI.shape[1], pictures.rate))
        return kept_KI.to(pictures.hidden_KIC.dtype)

    def flops(self, config: SparsityConfig, hidden_size: int, tokens: float) -> float:
        """Return the FLOPs of scoring a picture of ``tokens`` image tokens."""
        return 0.0


class OutputMethod(Method, ABC):
    """Decides which output tokens stay in the K/V cache: a new method has a :meth:`keep`."""

    has_dial: ClassVar[bool] = False  # whether it decides by a margin, whose quantiles text_margins holds

    @abstractmethod
    def keep(self, outputs: Outputs) -> Tensor:
        """Return which tokens stay: bool ``[B, N]``."""

    def weigh(self, outputs: Outputs, valid_BN: Tensor, draw: Draw) -> Tensor:
        """Return the 0/1 mask ``[B, N]`` that training weighs keys with: by default, the decision.

        ``valid_BN`` tells output tokens from padding, whose mask does not count.
        """
        return self.keep(outputs).to(outputs.hidden_BNC.dtype)

    def held_before(self, kept_T: Tensor, rate: float) -> Tensor:
        """Return how many output tokens were held before each was decoded, int64 ``[T]``.

        ``kept_T``, bool, tells which are held at the end of the answer.
        """
        return kept_T.long().cumsum(0) - kept_T.long()

    def flops(self, config: SparsityConfig, hidden_size: int) -> float:
        """Return the FLOPs of the decision on one token."""
        return 0.0


@dataclass(frozen=True)
class Held:
    """The output tokens in the cache, the newest among them.

    Attributes
    ----------
    ordinal_BS
        Index within the answer of the token in each slot.
    is_output_BS
        Which slots hold an output token.
    mass_BS
        Attention that each has received, summed over steps and sparse layers, mean over heads.
    newest_BS
        Of that, what the newest token paid.
    """

    ordinal_BS: Tensor
    is_output_BS: Tensor
    mass_BS: Tensor
    newest_BS: Tensor


class EvictingMethod(OutputMethod):
    """Holds at most ``ceil(rate * t)`` of the t output tokens so far, and needs a K/V cache for it.

    A new method has a :meth:`rank`. The prompt always stays, as under every method for output tokens; the
    cache holds the same tokens in all sparse layers and heads.
    """

    @classmethod
    def needs(cls) -> Iterator[str]:
        """Yield in words what it asks for beside the tokens."""
        yield "a K/V cache"

    def budget(self, fed: int, rate: float) -> int:
        """Return how many of ``fed`` output tokens may be held."""
        return max(1, math.ceil(rate * fed))

    @abstractmethod
    def rank(self, held: Held, budget: int) -> Tensor:
        """Return numbers ``[B, S]``: over ``budget``, the token of a row with the least goes."""

    def evict(self, held: Held, rate: float) -> Tensor:
        """Return the slot to give up in each row, -1 where none needs to be: int64 ``[B]``."""
        fed = int(held.ordinal_BS.masked_fill(~held.is_output_BS, -1).amax()) + 1  # the same for every row
        budget = self.budget(fed, rate)
        rank_BS = self.rank(held, budget).double().masked_fill(~held.is_output_BS, torch.inf)
        is_over_B = held.is_output_BS.sum(-1) > budget
        return torch.where(is_over_B, rank_BS.argmin(-1), -1)

    def keep(self, outputs: Outputs) -> Tensor:
        """Refuse: what stays is not known when a token is decoded."""
        raise ValueError(
            f"{type(self).__name__} gives up earlier tokens, which only decoding with a K/V cache can: "
            " leave out use_cache=False and answer_mask, or choose another policy"
        )

    def held_before(self, kept_T: Tensor, rate: float) -> Tensor:
        """Return the budget: it was full at every step."""
        return torch.tensor([min(fed, self.budget(fed, rate)) for fed in range(len(kept_T))])
