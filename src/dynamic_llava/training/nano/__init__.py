"""``nano``: the model that this project trains from nothing and ships, and the data that it learns from."""

from __future__ import annotations

from dynamic_llava.training.nano.model import IMAGE_SIDE, PATCH_SIDE, build_model, build_processor

__all__ = ["IMAGE_SIDE", "PATCH_SIDE", "build_model", "build_processor"]
