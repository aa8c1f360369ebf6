"""Judges the rates of a request before it enters the engine, where a mistake gets an answer of its own (400).

vLLM asks logits processors whether they accept a request's parameters; these change no logits.
"""

from __future__ import annotations

from typing import Any

from vllm.sampling_params import SamplingParams
from vllm.v1.sample.logits_processor import LogitsProcessor as LogitsProcessorV1
from vllm.v1.worker.gpu.sample.logits_processor import LogitsProcessor as LogitsProcessorV2

from dynamic_llava.config import SparsityConfig
from dynamic_llava.vllm.rates import NAMES, explains, request_rates


def check(params: SamplingParams, are_fixed: bool) -> None:
    """Raise ``ValueError`` if a request asks for rates that it cannot have, or for what is not served."""
    if are_fixed and (asked := sorted(set(params.extra_args or {}) & set(NAMES))):
        raise ValueError(f"{', '.join(asked)}: this server has fixed its rates, leave it out")
    request_rates(SparsityConfig(), params.extra_args)
    explains(params.extra_args)
    if params.prompt_logprobs is not None:
        raise ValueError("prompt_logprobs: a dropped prompt token has none, leave it out")


class CheckedV1(LogitsProcessorV1):
    """For Model Runner V1."""

    are_fixed = False

    def __init__(self, vllm_config: Any, device: Any, is_pin_memory: bool) -> None:
        """Keep nothing."""

    @classmethod
    def validate_params(cls, sampling_params: SamplingParams) -> None:
        """Refuse what :func:`check` refuses."""
        check(sampling_params, cls.are_fixed)

    def is_argmax_invariant(self) -> bool:
        """Return that greedy sampling need not ask."""
        return True

    def update_state(self, batch_update: Any) -> None:
        """Keep nothing."""

    def apply(self, logits: Any) -> Any:
        """Return the logits as they are."""
        return logits


class CheckedV2(LogitsProcessorV2):
    """For Model Runner V2."""

    are_fixed = False

    @classmethod
    def validate_params(cls, sampling_params: SamplingParams) -> None:
        """Refuse what :func:`check` refuses."""
        check(sampling_params, cls.are_fixed)

    def add_request(self, req_idx: int, sampling_params: SamplingParams) -> bool:
        """Return that no logits change."""
        return False

    def apply(self, logits: Any, ctx: Any) -> Any:
        """Return the logits as they are."""
        return logits


class FixedV1(CheckedV1):
    """The same where the server's rates hold for all."""

    are_fixed = True


class FixedV2(CheckedV2):
    """The same where the server's rates hold for all."""

    are_fixed = True
