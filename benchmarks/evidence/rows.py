"""Statistics over the rows of benchmarks/results/evidence.json: one measurement of one seed each."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from statistics import fmean, stdev
from typing import Any

STUDENT_95 = {1: 0.0, 2: 12.706, 3: 4.303}  # two-sided quantile of t for the mean of n values
Row = dict[str, Any]


def summary(values: Sequence[float]) -> tuple[float, float]:
    """Return the mean over seeds and the half-width of its 95 % interval (Student's t)."""
    spread = stdev(values) if len(values) > 1 else 0.0
    return fmean(values), STUDENT_95[len(values)] * spread / len(values) ** 0.5


def select(rows: Iterable[Row], **wanted: Any) -> list[float]:
    """Return the values of the rows that have all of ``wanted``, by seed."""
    found = [row for row in rows if all(row[name] == value for name, value in wanted.items())]
    return [row["value"] for row in sorted(found, key=lambda row: row["seed"])]


def rates_of(rows: Iterable[Row], name: str) -> list[float]:
    """Return the keep rates of ``rows`` below 1, in order."""
    return sorted({row[name] for row in rows} - {1.0})
