"""Checkpoints: loading from ours, transformers' and the official format, saving, converting."""

from __future__ import annotations

from dynamic_llava.checkpoints.convert import Conversion, convert
from dynamic_llava.checkpoints.load import load, load_model
from dynamic_llava.checkpoints.save import resolve, save

__all__ = ["Conversion", "convert", "load", "load_model", "resolve", "save"]
