"""Families that vLLM serves sparse: a file each, named after the ``model_type``, with a class ``Sparse``."""

from __future__ import annotations

import pkgutil

from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)


def served() -> list[str]:
    """Return the model types that are served sparse."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


def model_class(model_type: str) -> str:
    """Return where the class of a served model type is, as vLLM's registry takes it; nothing is imported."""
    return f"{__name__}.{model_type}:Sparse"


def architecture(model_type: str) -> str:
    """Return what ``architectures`` of a config.json says for a model type; empty where it has no name."""
    names = {**MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, **MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES}
    found = names.get(model_type, "")
    return found if isinstance(found, str) else found[0]
