"""Statistics over the rows of evidence/results/evidence.json: one measurement of one seed each."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from math import inf
from statistics import fmean, stdev
from typing import Any

# Two-sided quantiles of Student's t for the mean of n values; one value says nothing of its spread.
STUDENT_95 = {1: inf, 2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365}
Row = dict[str, Any]


def summary(values: Sequence[float]) -> tuple[float, float]:
    """Return the mean over seeds and the half-width of its 95 % interval (Student's t)."""
    spread = stdev(values) if len(values) > 1 else 1.0
    return fmean(values), STUDENT_95[len(values)] * spread / len(values) ** 0.5


def differ(one: Sequence[float], other: Sequence[float]) -> bool:
    """Say whether the 95 % interval of the difference, paired by seed, is without zero."""
    mean, reach = summary([a - b for a, b in zip(one, other, strict=True)])
    return abs(mean) > reach


def select(rows: Iterable[Row], **wanted: Any) -> list[float]:
    """Return the values of the rows that have all of ``wanted``, by seed."""
    found = [row for row in rows if all(row[name] == value for name, value in wanted.items())]
    return [row["value"] for row in sorted(found, key=lambda row: row["seed"])]


def rates_of(rows: Iterable[Row], name: str) -> list[float]:
    """Return the keep rates of ``rows`` below 1, in order."""
    return sorted({row[name] for row in rows} - {1.0})
