"""Tensor names of the official code, as an attached stock model has them."""

from __future__ import annotations

RENAMED = {
    "model.vision_tower.vision_tower.vision_model.": "model.vision_tower.",
    "model.mm_projector.0.": "model.multi_modal_projector.linear_1.",
    "model.mm_projector.2.": "model.multi_modal_projector.linear_2.",
    "model.image_score_predictor.": "sparsifier.image_predictor.",
    "model.output_text_score_predictor.": "sparsifier.text_predictor.",
    "model.instruct_score_predictor.": "sparsifier.prompt_predictor.",
    "lm_head.": "lm_head.",
    "model.": "model.language_model.",
}


def our_name(official: str) -> str:
    """Return the name of an official parameter in an attached stock model."""
    prefix = next(old for old in RENAMED if official.startswith(old))
    return RENAMED[prefix] + official.removeprefix(prefix)
