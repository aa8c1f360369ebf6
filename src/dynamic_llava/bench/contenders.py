"""The contenders: one set of weights, several ways to hold the context.

Legend: B batch, Q new tokens, S slots, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, StaticCache

from dynamic_llava.bench.building import Subject, fill, shell, size_in_bytes
from dynamic_llava.bench.calibration import keep_share
from dynamic_llava.bench.workload import Workload
from dynamic_llava.config import SparsityConfig
from dynamic_llava.core.cache import context_of
from dynamic_llava.core.report import Report
from dynamic_llava.costs.shape import DecoderShape
from dynamic_llava.sparsifier import Sparsifier


@dataclass(frozen=True)
class Contender:
    """A model and how it holds its context.

    Parameters
    ----------
    name
        As it is shown.
    model
        The stock model, or a shell of it that ``sparsifier`` is attached to.
    sparsifier
        None for stock transformers.
    image_tokens
        Tokens of the pictures that it looks at; None takes those of the workload.
    """

    name: str
    model: Any
    sparsifier: Sparsifier | None = None
    image_tokens: int | None = None

    @property
    def shape(self) -> DecoderShape:
        """Sizes of its decoder."""
        return DecoderShape.from_config(self.model.config.text_config)

    @property
    def can_compile(self) -> bool:
        """Whether its decoding step has a fixed shape."""
        return self.sparsifier.evicting is None if self.sparsifier else self.name == "static"

    def given(self, work: Workload) -> Workload:
        """Return what it is fed of ``work``."""
        return work if self.image_tokens is None else work.with_image_tokens(self.image_tokens)

    def calibrate(self, work: Workload) -> None:
        """Make a learned decision on output tokens keep the share of ``work`` that it is asked for."""
        if self.sparsifier is None or not self.sparsifier.config.sparsify_text:
            return
        if self.sparsifier.text_method.has_dial:
            keep_share(self.model, self.sparsifier, work)

    def new_cache(self, capacity: int, compiled: bool) -> Cache:
        """Return an empty cache of exactly ``capacity`` tokens a row, where it can be told."""
        if self.sparsifier is not None:
            return self.sparsifier.new_cache(capacity, static=compiled)
        config = self.model.config.text_config
        if self.name == "static":
            return StaticCache(config=config, max_cache_len=capacity)
        return DynamicCache(config=config)


def stock(subject: Subject, name: str) -> Contender:
    """Return a contender that is stock transformers: ``dense`` or ``static``."""
    return Contender(name, subject.model)


def attached(
    subject: Subject, name: str, config: SparsityConfig, image_tokens: int | None = None
) -> Contender:
    """Return a contender with a sparsifier of its own, and pictures of ``image_tokens`` tokens.

    Its predictors are the checkpoint's, or random.
    """
    sparsifier = Sparsifier(config, subject.model.config.text_config.hidden_size).eval()
    if subject.trained:
        made = sparsifier.state_dict().keys()
        sparsifier.load_state_dict({name: subject.trained[name] for name in made})
    else:  # wide, so that decisions are mixed; vectors keep their initial values
        fill((weight for weight in sparsifier.parameters() if weight.ndim > 1), config.seed, scale=2.0)
    model = shell(subject.model)
    sparsifier.attach(model)
    return Contender(name, model, sparsifier, image_tokens)


class Session:
    """One contender's live cache: a prefill, then output tokens one by one.

    Parameters
    ----------
    contender
        Who runs.
    work
        What is fed.
    compiled
        Whether to compile the decoding step where the contender can.
    """

    def __init__(self, contender: Contender, work: Workload, compiled: bool) -> None:
        self.contender, self.work = contender, contender.given(work)
        compiled = compiled and contender.can_compile
        self.capacity = self.work.prompt + self.work.output
        self.cache = contender.new_cache(self.capacity, compiled)
        self._decode = _compile(contender.model) if compiled else contender.model
        self._visible_11QS: Tensor | None = None

    def prefill(self) -> Tensor:
        """Feed the prompts; return the last logits ``[B, 1, V]``."""
        if isinstance(self.cache, StaticCache):  # as generate() does: transformers would show all slots
            visible = torch.arange(self.capacity, device=self.work.fed_BT.device) < self.work.prompt
            self._visible_11QS = visible[None, None, None]
        inputs = self.work.prompt_inputs()
        return self.contender.model(
            **inputs, past_key_values=self.cache, use_cache=True, logits_to_keep=1
        ).logits

    def step(self, number: int) -> Tensor:
        """Feed output token ``number`` of every row; return the logits ``[B, 1, V]``."""
        mask: dict[str, Tensor] = {}
        if self._visible_11QS is not None:
            self._visible_11QS[..., self.work.prompt + number] = True
            mask = {"attention_mask": self._visible_11QS}
        return self._decode(
            input_ids=self.work.fed_BT[:, number : number + 1],
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=1,
            **mask,
        ).logits

    def allocated_bytes(self) -> int:
        """Return the bytes of the storage of all keys and values."""
        layers: Iterable[Any] = self.cache.layers
        return sum(size_in_bytes((layer.keys, layer.values)) for layer in layers if layer.is_initialized)

    def held_bytes(self, tokens: int) -> int:
        """Return the bytes of the keys and values in use, ``tokens`` having been fed to each row."""
        shape = self.contender.shape
        one = shape.kv_bytes_per_token(self.contender.model.dtype.itemsize)
        if (context := context_of(self.cache)) is not None:
            return one * int(Report(context.record).kv_lengths.sum())
        return one * shape.layers * self.work.batch * tokens

    def kept_share(self) -> float:
        """Return the share of the output tokens fed so far that stayed."""
        context = context_of(self.cache)
        if context is None:
            return 1.0
        return torch.stack(Report(context.record).text_kept).double().mean().item()


def _compile(model: Any) -> Any:
    mode = "reduce-overhead" if model.device.type == "cuda" else "default"
    return torch.compile(model, mode=mode, fullgraph=True, dynamic=False)
