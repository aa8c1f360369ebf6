"""The model that a benchmark runs: a preset's sizes with random weights, or a checkpoint.

Weights are made where they will stay and in their final dtype, so that building needs no more memory than the
model itself.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForImageTextToText

from dynamic_llava.costs.presets import Preset
from dynamic_llava.sparsifier import sparsifier_of

BLOCK = 1_048_583  # random numbers that all weights repeat; a prime, so that no two rows of a matrix agree
_TOWER = {
    "hidden_size": 8,
    "intermediate_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 1,
    "image_size": 8,
    "patch_size": 8,
}
_QWEN_TOWER = {"depth": 1, "num_heads": 1, "hidden_size": 8, "intermediate_size": 8}
_MROPE = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]}
PARTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {  # decoder and a tower as small as can be
    "llava": ({"model_type": "llama"}, {"model_type": "clip_vision_model", **_TOWER}),
    "llava_onevision": ({"model_type": "qwen2"}, {"model_type": "siglip_vision_model", **_TOWER}),
    "qwen2_5_vl": (
        {"model_type": "qwen2_5_vl_text", "rope_parameters": _MROPE},
        _QWEN_TOWER | {"fullatt_block_indexes": [0]},
    ),
    "qwen3_vl": (
        {"model_type": "qwen3_vl_text", "rope_parameters": _MROPE},
        _QWEN_TOWER | {"deepstack_visual_indexes": []},
    ),
    "internvl": (
        {"model_type": "qwen2"},
        {"model_type": "internvl_vision", **_TOWER, "image_size": [8, 8], "patch_size": [8, 8]},
    ),
}

SHIFT = 7_919  # where the next weight starts in them: no two weights agree
AS_TENSOR = {"internvl"}  # families that take encoded pictures as one tensor, not one by one


@dataclass(frozen=True)
class Subject:
    """The stock model of a run.

    Parameters
    ----------
    model
        Not attached.
    image_tokens
        Tokens of one picture.
    predictor
        Sizes of predictors that fit it, as in :class:`~dynamic_llava.SparsityConfig`.
    trained
        The predictors of a checkpoint, by name; empty where there are none.
    """

    model: Any
    image_tokens: int
    predictor: Mapping[str, Any]
    trained: Mapping[str, Tensor] = field(default_factory=dict)


def skeleton(preset: Preset, layers: int | None) -> Any:
    """Return a preset's model without storage (on the meta device), cut to ``layers`` layers.

    Its vision tower is as small as can be: the benchmark starts behind it.
    """
    shape, head_dim = preset.shape, preset.shape.query_width // preset.heads
    decoder, tower = PARTS[preset.model_type]
    config = AutoConfig.for_model(
        preset.model_type,
        text_config={
            **decoder,
            "vocab_size": preset.vocabulary,
            "hidden_size": shape.hidden,
            "intermediate_size": shape.intermediate,
            "num_hidden_layers": layers or shape.layers,
            "num_attention_heads": preset.heads,
            "num_key_value_heads": shape.key_width // head_dim,
            "head_dim": head_dim,
            "max_position_embeddings": 8192,
            "bos_token_id": 1,
            "eos_token_id": None,
            "pad_token_id": 0,
        },
        vision_config=tower | ({"out_hidden_size": shape.hidden} if "depth" in tower else {}),
        image_token_id=preset.vocabulary - 1,
        image_token_index=preset.vocabulary - 1,
        image_seq_length=preset.image_tokens,
        tie_word_embeddings=False,
    )
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config).eval()
    model.generation_config.eos_token_id = None  # every answer has the length asked for
    return model


def materialise(model: Any, dtype: torch.dtype, device: torch.device, seed: int) -> Any:
    """Give a skeleton storage and random weights."""
    torch.nn.Module.to(model, dtype)
    model.to_empty(device=device)
    fill(model.parameters(), seed)
    decoder: Any = model.model.language_model
    # Its frequencies are no parameters: to_empty left them undefined, and they stay in float32.
    decoder.rotary_emb = type(decoder.rotary_emb)(config=decoder.config).to(device)
    return model


@torch.no_grad()
def fill(parameters: Iterable[Tensor], seed: int, scale: float = 1.0) -> None:
    """Fill matrices with random numbers of standard deviation ``scale * fan_in ** -0.5``, vectors with ones.

    The numbers are bounded away from zero: none is denormal, which processors may multiply slowly.
    """
    generator = torch.Generator().manual_seed(seed)
    magnitude = torch.empty(BLOCK).uniform_(0.5, 1.427, generator=generator)  # mean square 1
    sign = torch.randint(0, 2, (BLOCK,), generator=generator) * 2 - 1
    block = magnitude * sign
    for number, parameter in enumerate(parameters):
        if parameter.ndim < 2:
            parameter.fill_(1)
            continue
        scaled = block.roll(number * SHIFT) * (scale * parameter[0].numel() ** -0.5)
        scaled = scaled.to(parameter.device, parameter.dtype)
        flat = parameter.view(-1)
        whole = len(flat) - len(flat) % BLOCK
        flat[:whole].view(-1, BLOCK).copy_(scaled)
        flat[whole:] = scaled[: len(flat) - whole]


def from_checkpoint(source: str, dtype: torch.dtype, device: torch.device) -> Subject:
    """Load a checkpoint and take its sparsifier, if it has one, off again."""
    import dynamic_llava

    model: Any = dynamic_llava.load_model(source, dtype, device)
    sparsifier = sparsifier_of(model)
    model.generation_config.eos_token_id = None  # every answer has the length asked for
    tokens = model.config.image_seq_length
    if sparsifier is None:
        return Subject(model, tokens, {})
    sparsifier.detach()
    sizes = ("d_model", "nhead", "dim_feedforward", "num_layers")
    state = {k: v for k, v in sparsifier.state_dict().items() if not k.startswith("prompt_predictor.")}
    return Subject(model, tokens, {name: getattr(sparsifier.config, name) for name in sizes}, state)


def shell(model: Any) -> Any:
    """Return a copy of a model's modules that shares all of its tensors, so that it can be attached alone."""
    tensors = itertools.chain(model.parameters(), model.buffers())
    return copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})


def size_in_bytes(tensors: Iterable[Tensor]) -> int:
    """Return how much memory tensors take."""
    return sum(tensor.nbytes for tensor in tensors)
