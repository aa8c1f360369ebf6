"""A preset that runs in milliseconds, and a machine whose bandwidth is measured as fast."""

from __future__ import annotations

from typing import Any

import pytest

from dynamic_llava.bench import Settings, machine
from dynamic_llava.costs.presets import PRESETS, Preset
from dynamic_llava.costs.shape import DecoderShape

TINY = Preset(
    DecoderShape(layers=4, hidden=32, intermediate=64, query_width=32, key_width=32),
    heads=4,
    vocabulary=64,
    image_tokens=16,
    predictor={"d_model": 16, "nhead": 2, "dim_feedforward": 32},
)
IMAGE_TOKENS, TEXT_TOKENS = 16, 6


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PRESETS, "tiny", TINY)
    monkeypatch.setattr(machine, "READ_BYTES", 2**16)


def settings(**changes: Any) -> Settings:
    """Settings of a run of the tiny preset."""
    values: dict[str, Any] = {
        "model": "tiny",
        "phases": ("prefill", "decode"),
        "contenders": ("dense", "static", "preallocated", "learned"),
        "batches": (2,),
        "output_tokens": (12,),
        "text_tokens": TEXT_TOKENS,
        "image_keep_rate": 0.25,
        "text_keep_rate": 0.5,
        "layer": 2,
        "repeats": 2,
        "layers": None,
        "dtype": None,
        "device": "cpu",
        "compiled": False,
        "seed": 0,
    }
    return Settings(**values | changes)
