"""Whether a sparsifier fits a model, and where it then computes."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
import transformers
from packaging.version import Version
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from transformers import PreTrainedModel

from dynamic_llava.core.attention.interface import IMPLEMENTATIONS

TESTED = (Version("5.16.1"), Version("5.24.0"))  # of transformers: see `make test-versions`
LAYER_TYPES = ("full_attention", "sliding_attention")
REPLICA = (
    "the model is a replica made by torch.nn.DataParallel, which copies no sparsifier: use "
    "DistributedDataParallel, one process a device"
)


def check_kind(model: Any) -> None:
    """Raise ``ValueError`` if ``model`` is no whole model of transformers that hooks can be put on."""
    kind = type(model).__name__
    if hasattr(model, "get_base_model"):
        raise ValueError(f"{kind} is peft's wrapper: attach to model.get_base_model(), and train the wrapper")
    if isinstance(model, nn.DataParallel | DistributedDataParallel):
        raise ValueError(f"{kind} is a wrapper: attach to model.module, before it is wrapped")
    if isinstance(model, str | Path):
        raise ValueError(f"{str(model)!r} is a name: load the model first, dynamic_llava.load_model(...)")
    if not isinstance(model, PreTrainedModel):
        raise ValueError(f"{kind} is no model of transformers: attach to one, as load_model(...) returns it")
    if model.base_model is model:
        raise ValueError(f"{kind} is the model inside of another: attach to the whole one, with the head")
    if "_is_replica" in vars(model):
        raise ValueError(REPLICA)


def check_fit(model: PreTrainedModel, decoder: Any, hidden_size: int, base_model: str) -> None:
    """Raise ``ValueError`` if predictors of ``hidden_size`` do not fit ``model``.

    Warns if ``base_model``, which they were trained for, is another one, or if transformers is of a version
    that was not tested.
    """
    config = decoder.config
    if config.hidden_size != hidden_size:
        trained_for = f" (trained for {base_model})" if base_model else ""
        raise ValueError(
            f"hidden_size is {hidden_size}{trained_for}, the model's decoder has {config.hidden_size}"
        )
    names = [Path(name).name for name in (base_model, model.name_or_path) if name]
    if len(set(names)) > 1:
        _warn(
            f"the sparsifier was trained for {base_model}, not for {model.name_or_path}: its "
            "decisions may not fit"
        )
    if config._attn_implementation not in IMPLEMENTATIONS:
        raise ValueError(
            f"attention implementation {config._attn_implementation!r} is not supported: load the model "
            f"with attn_implementation set to {' or '.join(IMPLEMENTATIONS)}"
        )
    _check_layers(config)
    version = Version(transformers.__version__)
    if not TESTED[0] <= version <= TESTED[1]:
        _warn(f"transformers {version} was not tested: {TESTED[0]} to {TESTED[1]} were")


def computes_on(layer: nn.Module) -> torch.device:
    """Return the device of a layer's work: not that of its weights where accelerate offloads them."""
    execution_device = getattr(getattr(layer, "_hf_hook", None), "execution_device", None)
    return next(layer.parameters()).device if execution_device is None else torch.device(execution_device)


def _check_layers(config: Any) -> None:
    """Refuse layers that do not each attend to keys of their own."""
    types = set(getattr(config, "layer_types", None) or ())
    if other := sorted(types - set(LAYER_TYPES)):
        raise ValueError(f"the decoder has layers of type {other[0]}: only {' and '.join(LAYER_TYPES)} work")
    if getattr(config, "attn_logit_softcapping", None):
        raise ValueError(
            "the decoder caps its attention scores (attn_logit_softcapping), which sdpa and this library "
            "leave out: it is not supported"
        )
    if getattr(config, "num_kv_shared_layers", 0):
        raise ValueError("the decoder's layers share keys and values, which is not supported")
    is_sliding = "sliding_attention" in types or (not types and getattr(config, "sliding_window", None))
    if is_sliding and "flash" in config._attn_implementation:
        raise ValueError(
            "flash attention counts a sliding window in kept tokens: load the model with "
            "attn_implementation='sdpa'"
        )


def _warn(message: str) -> None:
    warnings.warn(message, stacklevel=4)
