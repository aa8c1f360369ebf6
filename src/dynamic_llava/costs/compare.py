"""What an answer costs by count, nothing run: the dense model beside FastV and Dynamic-LLaVA."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from dynamic_llava.config import SparsityConfig
from dynamic_llava.costs.flops import Answering, paper_flops, prefill_flops
from dynamic_llava.costs.presets import preset
from dynamic_llava.methods.predictors import image_predictor_flops, text_predictor_flops
from dynamic_llava.methods.top_k import keep_count

FLOAT16 = 2  # bytes


@dataclass(frozen=True)
class Settings:
    """One picture, a prompt beside it, an answer, and what each method keeps of them.

    Parameters
    ----------
    preset
        Name of the model's sizes; see :mod:`dynamic_llava.costs.presets`.
    text_tokens, output_tokens
        Tokens of the prompt beside the image tokens, and of the answer.
    layer, image_keep_rate, text_keep_rate
        Dynamic-LLaVA: its first sparse layer, and the shares of image tokens and of output tokens it keeps.
    fastv_layer, fastv_keep_rate
        FastV: its first sparse layer, and the share of image tokens it keeps.

    Raises
    ------
    ValueError
        If a value is outside its range.
    """

    preset: str
    text_tokens: int
    output_tokens: int
    layer: int
    image_keep_rate: float
    text_keep_rate: float
    fastv_layer: int
    fastv_keep_rate: float

    def __post_init__(self) -> None:
        layers = preset(self.preset).shape.layers
        for name in ("layer", "fastv_layer"):
            if not 1 <= getattr(self, name) < layers:
                raise ValueError(
                    f"{name} is {getattr(self, name)}: {self.preset} has {layers} layers, "
                    f"choose 1 to {layers - 1}"
                )
        for name in ("image_keep_rate", "text_keep_rate", "fastv_keep_rate"):
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(
                    f"{name} is {getattr(self, name)}: a keep rate must be greater than 0 and at most 1"
                )
        for name, least in (("text_tokens", 0), ("output_tokens", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} is {getattr(self, name)}: it must be at least {least}")


@dataclass(frozen=True)
class Costs:
    """What one method keeps and costs.

    Attributes
    ----------
    image_tokens_kept, output_tokens_kept
        Tokens in the context of the sparse layers; output tokens on average.
    prefill_flops_paper, decode_flops_paper
        As the paper counts, see :func:`~dynamic_llava.costs.flops.paper_flops`: image tokens alone, output
        tokens alone.
    prefill_flops
        Of the layers as they are, image and text tokens, with the image predictor where tokens are dropped.
    prefill_speedup_bound
        Dense ``prefill_flops`` divided by these: what the decoder could gain if time went by FLOPs.
    decode_flops_cached, decode_flops_uncached
        Of the whole answer after its prompt, with a K/V cache and recomputing everything at each step, with
        the predictors where tokens are dropped.
    kv_bytes_float16
        K/V cache at the end of the answer, prompt included.
    """

    image_tokens_kept: int
    output_tokens_kept: float
    prefill_flops_paper: float
    prefill_flops: float
    prefill_speedup_bound: float
    decode_flops_paper: float
    decode_flops_cached: float
    decode_flops_uncached: float
    kv_bytes_float16: int


def compare(settings: Settings) -> dict[str, Costs]:
    """Return the costs of ``dense``, ``fastv`` and ``dynamic_llava``.

    FastV ranks image tokens by attention that is computed anyway: its choice counts as free.
    """
    chosen = preset(settings.preset)
    images, hidden = chosen.image_tokens, chosen.shape.hidden
    kept = keep_count(images, settings.image_keep_rate)
    config = SparsityConfig(**chosen.predictor)
    return {
        "dense": _costs(settings, settings.layer, images, 1.0),
        "fastv": _costs(settings, settings.fastv_layer, keep_count(images, settings.fastv_keep_rate), 1.0),
        "dynamic_llava": _costs(
            settings,
            settings.layer,
            kept,
            settings.text_keep_rate,
            image_predictor=image_predictor_flops(config, hidden, images) if kept < images else 0.0,
            text_predictor=text_predictor_flops(config, hidden) if settings.text_keep_rate < 1 else 0.0,
        ),
    }


def as_json(settings: Settings, costs: dict[str, Costs]) -> dict[str, Any]:
    """Return plain values: the settings, and the costs of each method."""
    image_tokens = preset(settings.preset).image_tokens
    return {
        "settings": asdict(settings) | {"image_tokens": image_tokens},
        **{name: asdict(cost) for name, cost in costs.items()},
    }


def _costs(
    settings: Settings,
    layer: int,
    image_kept: int,
    output_keep_rate: float,
    image_predictor: float = 0.0,
    text_predictor: float = 0.0,
) -> Costs:
    chosen, output = preset(settings.preset), settings.output_tokens
    shape, images = chosen.shape, chosen.image_tokens
    prompt, prompt_kept = images + settings.text_tokens, image_kept + settings.text_tokens
    answering = Answering(shape, layer, prompt, prompt_kept, output, output_keep_rate)
    prefill = prefill_flops(shape, prompt, prompt_kept, layer) + image_predictor
    # Without a cache every step scores the picture and all output tokens so far anew.
    repeated = output * image_predictor + output * (output + 1) / 2 * text_predictor
    return Costs(
        image_tokens_kept=image_kept,
        output_tokens_kept=output_keep_rate * output,
        prefill_flops_paper=float(paper_flops(shape, images, image_kept, layer)),
        prefill_flops=prefill,
        prefill_speedup_bound=prefill_flops(shape, prompt, prompt, layer) / prefill,
        decode_flops_paper=float(paper_flops(shape, output, output_keep_rate * output, layer)),
        decode_flops_cached=answering.cached_flops + output * text_predictor,
        decode_flops_uncached=answering.uncached_flops + repeated,
        kv_bytes_float16=round(answering.kv_bytes(FLOAT16)),
    )
