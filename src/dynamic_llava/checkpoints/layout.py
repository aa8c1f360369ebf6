"""Tensor names inside transformers' checkpoints of LLaVA, which are not the module paths."""

from __future__ import annotations

HUB = {
    "model.language_model.": "language_model.model.",
    "lm_head.": "language_model.lm_head.",
    "model.vision_tower.": "vision_tower.",
    "model.multi_modal_projector.": "multi_modal_projector.",
}


def to_hub(path: str) -> str:
    """Return the name in a file of a module path."""
    module = next(module for module in HUB if path.startswith(module))
    return HUB[module] + path.removeprefix(module)


def from_hub(name: str) -> str:
    """Return the module path of a name in a file: the inverse of :func:`to_hub`, also for newer layouts."""
    hub = next((hub for hub in HUB.values() if name.startswith(hub)), None)
    if hub is None:
        return name
    module = next(module for module, known in HUB.items() if known == hub)
    return module + name.removeprefix(hub).removeprefix("vision_model.")
