"""What `evaluate` shows fits a terminal of 80 columns, whole."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from dynamic_llava.evaluation import table

RESULTS = Path("evidence/results")


def shown(file: str) -> list[str]:
    written = io.StringIO()
    Console(width=80, file=written).print(table(json.loads((RESULTS / file).read_text())["numbers"]))
    return written.getvalue().splitlines()


def row(lines: list[str], label: str) -> list[str]:
    """Return the cells of the line that starts with ``label``."""
    return next(line.split(label)[1].split() for line in lines if line.strip().startswith(f"{label} "))


@pytest.mark.parametrize(
    "file", ["descriptions-nano-sparse.json", "easy-vqa-nano-sparse.json", "scenes-nano-dense.json"]
)
def test_nothing_is_cut(file: str) -> None:
    lines = shown(file)
    assert max(map(len, lines)) <= 80
    assert "…" not in "".join(lines)


def test_settings_stand_side_by_side() -> None:
    numbers = json.loads((RESULTS / "descriptions-nano-sparse.json").read_text())["numbers"]
    lines = shown("descriptions-nano-sparse.json")
    for label, wanted in (
        ("perplexity", [f"{setting['perplexity']:.4f}" for setting in numbers.values()]),
        ("METEOR", [f"{setting['meteor']:.4f}" for setting in numbers.values()]),
        ("exactly right", [f"{setting['accuracy']:.1f}%" for setting in numbers.values()]),
        ("image tokens kept", [f"{setting['image_tokens_kept']:.1%}" for setting in numbers.values()]),
        ("K/V held, MB", [f"{setting['kv_bytes'] / 1e6:.2f}" for setting in numbers.values()]),
        ("decode, GFLOPs", [f"{1e3 * setting['decode_tflops']:.2f}" for setting in numbers.values()]),
    ):
        assert row(lines, label) == wanted


def test_kinds_stand_below_each_other() -> None:
    numbers = json.loads((RESULTS / "easy-vqa-nano-sparse.json").read_text())["numbers"]
    lines = shown("easy-vqa-nano-sparse.json")
    for kind, found in {"all": numbers, **numbers["kinds"]}.items():
        (line,) = [line for line in lines if line.strip().startswith(kind)]
        assert f"{found['right']:,} of {found['total']:,}" in line
        assert f"{found['accuracy']:.1f}%" in line
    assert f"{numbers['image_tokens_kept']:.1%} of the image tokens" in " ".join(lines)
