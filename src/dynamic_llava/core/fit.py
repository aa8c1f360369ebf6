"""Whether a sparsifier fits a model, and where it then computes."""

from __future__ import annotations

import warnings
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel

from dynamic_llava.core.attention import interface

# Decoders that equal the stock model at keep rate 1; others scale embeddings or norm in ways of their own.
DECODERS = ("llama", "mistral", "qwen2", "qwen3", "phi3", "stablelm", "gemma", "cohere")


def check_fit(model: PreTrainedModel, layer: int, hidden_size: int, base_model: str) -> None:
    """Raise ``ValueError`` if predictors of ``hidden_size``, used from ``layer`` on, do not fit ``model``.

    Warns if ``base_model``, which they were trained for, is another one.
    """
    if not hasattr(model.base_model, "language_model"):
        raise ValueError(
            f"{type(model).__name__} has no language_model inside: attach to a multimodal model such as "
            "LlavaForConditionalGeneration"
        )
    config = model.model.language_model.config
    if config.hidden_size != hidden_size:
        trained_for = f" (trained for {base_model})" if base_model else ""
        raise ValueError(
            f"hidden_size is {hidden_size}{trained_for}, the model's decoder has {config.hidden_size}"
        )
    names = [Path(name).name for name in (base_model, model.name_or_path) if name]
    if len(set(names)) > 1:
        warnings.warn(
            f"the sparsifier was trained for {base_model}, not for {model.name_or_path}: its "
            "decisions may not fit",
            stacklevel=4,
        )
    if layer >= config.num_hidden_layers:
        last = config.num_hidden_layers - 1
        raise ValueError(f"layer is {layer}: the decoder has {last + 1} layers, choose 1 to {last}")
    if config._attn_implementation not in interface.STOCK_ATTENTION:
        raise ValueError(
            f"attention implementation {config._attn_implementation!r} is not supported: load the model "
            f"with attn_implementation set to {' or '.join(interface.STOCK_ATTENTION)}"
        )
    if getattr(config, "sliding_window", None):
        raise ValueError("the decoder has sliding-window attention, which is not supported")
    if config.model_type not in DECODERS:
        raise ValueError(
            f"the decoder is a {config.model_type}, whose pass may be no plain loop over layers; "
            f"supported are {', '.join(DECODERS)}"
        )


def computes_on(layer: nn.Module) -> torch.device:
    """Return the device of a layer's work: not that of its weights where accelerate offloads them."""
    execution_device = getattr(getattr(layer, "_hf_hook", None), "execution_device", None)
    return next(layer.parameters()).device if execution_device is None else torch.device(execution_device)
