"""Shows the numbers of an evaluation in a terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.table import Table

COLUMNS = (
    "perplexity",
    "meteor",
    "accuracy",
    "interval_95",
    "total",
    "image_tokens_kept",
    "output_tokens_kept",
    "decode_tflops_paper",
    "decode_tflops",
    "kv_bytes",
    "mean_answer_tokens",
)


def table(numbers: Mapping[str, Any]) -> Table:
    """Lay out what `evaluate` returned as ``numbers``: one row for each kind of question, or each setting."""
    rows = {"all": numbers, **numbers["kinds"]} if "kinds" in numbers else numbers
    columns = [name for name in COLUMNS if any(name in row for row in rows.values())]
    result = Table("", *(name.replace("_", " ") for name in columns))
    for name, row in rows.items():
        result.add_row(name, *(_cell(row.get(column, "")) for column in columns))
    return result


def _cell(value: object) -> str:
    return f"{value[0]} to {value[1]}" if isinstance(value, list) else str(value)
