"""Checkpoints: loading from ours, transformers' and the official format, saving, converting."""

from __future__ import annotations

from dynamic_llava.checkpoints.convert import Conversion, convert
from dynamic_llava.checkpoints.load import load, load_model, load_skeleton, load_with_processor
from dynamic_llava.checkpoints.save import save, save_predictors
from dynamic_llava.checkpoints.source import Source, resolve

__all__ = [
    "Conversion",
    "Source",
    "convert",
    "load",
    "load_model",
    "load_skeleton",
    "load_with_processor",
    "resolve",
    "save",
    "save_predictors",
]
