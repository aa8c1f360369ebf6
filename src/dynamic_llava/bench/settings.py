"""What a benchmark runs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from dynamic_llava import methods
from dynamic_llava.config import SparsityConfig
from dynamic_llava.costs.presets import PRESETS

PHASES = ("prefill", "decode", "no-cache", "overhead", "generate")
BASELINES = ("dense", "static", "preallocated")
PREALLOCATING = {"static", "preallocated"}  # their caches are all that sets them apart
DOWNSAMPLE = "downsample"
IDLE = "uniform"  # where a contender drops no tokens of a kind: a method without a predictor
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Settings:
    """Settings of a benchmark.

    Parameters
    ----------
    model
        Name of a preset (its sizes, random weights), or the folder or hub id of a checkpoint.
    phases
        Some of :data:`PHASES`.
    contenders
        Some of :func:`known_contenders`. ``dense``: stock transformers with its growing cache; ``static``:
        with its preallocated one; ``preallocated``: nothing dropped, in this library's cache;
        ``downsample``: the same with smaller pictures; the others are policies.
    batches, output_tokens
        Rows, and tokens of the answer, to measure with: every batch with every answer.
    text_tokens
        Tokens of the prompt beside the picture, one picture a row.
    image_keep_rate, text_keep_rate, layer
        See :class:`~dynamic_llava.SparsityConfig`.
    repeats
        Measurements of each contender, except in decoding, which has many steps.
    layers
        Cut a preset to so many layers; None takes all.
    dtype, device
        Such as ``"bfloat16"`` and ``"cuda"``; None chooses by the machine.
    compiled
        Compile the decoding step (CUDA graphs on a GPU), for all contenders but ``dense``.
    seed
        Seed of weights, tokens and random dropping.

    Raises
    ------
    ValueError
        If a value is outside its range.
    """

    model: str
    phases: tuple[str, ...]
    contenders: tuple[str, ...]
    batches: tuple[int, ...]
    output_tokens: tuple[int, ...]
    text_tokens: int
    image_keep_rate: float
    text_keep_rate: float
    layer: int
    repeats: int
    layers: int | None
    dtype: str | None
    device: str | None
    compiled: bool
    seed: int

    def __post_init__(self) -> None:
        for option, given, known in (
            ("--phase", self.phases, PHASES),
            ("--policies", self.contenders, known_contenders()),
        ):
            if unknown := [name for name in given if name not in known]:
                raise ValueError(f"{option} has {unknown[0]!r}: choose from {', '.join(known)}")
            if not given:
                raise ValueError(f"{option} is empty: choose from {', '.join(known)}")
        for phase in self.phases:
            if not set(self.contenders) - left_out(phase):
                raise ValueError(
                    f"--phase {phase} uses no preallocated cache: add dense or a policy to --policies"
                )
        if self.dtype is not None and self.dtype not in DTYPES:
            raise ValueError(f"--dtype is {self.dtype!r}: choose one of {', '.join(DTYPES)}")
        if self.layers is not None and self.model not in PRESETS:
            raise ValueError(f"--layers cuts presets only ({', '.join(PRESETS)}): {self.model} has its own")
        for option, numbers in (
            ("--batch", self.batches),
            ("--output-tokens", self.output_tokens),
            ("--text-tokens", (self.text_tokens,)),
            ("--repeats", (self.repeats,)),
            ("--layers", (self.layers,)),
        ):
            for number in numbers:
                if number is not None and number < 1:
                    raise ValueError(f"{option} is {number}: it must be at least 1")
        for name in self.contenders:
            self.sparsity(name, {})

    @property
    def torch_device(self) -> torch.device:
        """The device asked for, or the GPU where there is one."""
        try:
            device = torch.device(self.device or ("cuda" if torch.cuda.is_available() else "cpu"))
        except RuntimeError as error:
            raise ValueError(f"--device is {self.device!r}: choose cpu, cuda or cuda:N") from error
        if device.type not in ("cpu", "cuda"):
            raise ValueError(f"--device is {self.device!r}: choose cpu, cuda or cuda:N")
        if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
            raise ValueError(f"--device is {self.device!r}: torch sees {torch.cuda.device_count()} GPUs here")
        return device

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype asked for, or bfloat16 on a GPU and float32 elsewhere."""
        return DTYPES[self.dtype or ("bfloat16" if self.torch_device.type == "cuda" else "float32")]

    def sparsity(self, contender: str, predictor: Mapping[str, Any]) -> SparsityConfig:
        """Return what a contender drops; ``predictor`` holds the sizes of its predictors.

        Where a policy does not decide on output tokens (FastV), they all stay. Downsampling drops nothing:
        its pictures have fewer tokens to begin with.
        """
        drops_image, drops_text = (contender in methods.names(kind) for kind in ("image", "output"))
        return SparsityConfig(
            layer=self.layer,
            image_policy=contender if drops_image else IDLE,
            text_policy=contender if drops_text else IDLE,
            image_keep_rate=self.image_keep_rate,
            text_keep_rate=self.text_keep_rate,
            sparsify_image=drops_image,
            sparsify_text=drops_text,
            seed=self.seed,
            **predictor,
        )


def known_contenders() -> tuple[str, ...]:
    """Return the names of all contenders: baselines, and every method there is."""
    return (*BASELINES, *dict.fromkeys((*methods.names("image"), DOWNSAMPLE, *methods.names("output"))))


def left_out(phase: str) -> set[str]:
    """Return the contenders that a phase does not measure."""
    if phase == "generate":
        return PREALLOCATING
    if phase != "no-cache":
        return set()
    from dynamic_llava.methods.base import EvictingMethod

    evicting = {
        name for name in methods.names("output") if issubclass(methods.find("output", name), EvictingMethod)
    }
    return PREALLOCATING | evicting
