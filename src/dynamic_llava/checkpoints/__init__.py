"""Checkpoints: loading from ours, transformers' and the official format, saving, converting."""

from __future__ import annotations

from dynamic_llava.checkpoints.convert import Conversion, convert
from dynamic_llava.checkpoints.folders import resolve, save
from dynamic_llava.checkpoints.loading import load, load_model

__all__ = ["Conversion", "convert", "load", "load_model", "resolve", "save"]
