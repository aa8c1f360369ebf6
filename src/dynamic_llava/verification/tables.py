"""Shows the results of a verification."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Sequence
from itertools import groupby
from typing import Any

from rich.table import Table

from dynamic_llava.verification.comparison import Result, Status

STYLES = {Status.PASS: "green", Status.FAIL: "bold red", Status.DEFECT: "yellow", Status.NOT_COMPARED: "dim"}


def table(results: Sequence[Result]) -> Table:
    """Lay out one row a compared quantity; what was not compared for one reason shares a row."""
    shown = Table()
    for heading in ("file", "quantity", "max error", "tolerance", "result"):
        shown.add_column(heading, overflow="fold")
    for (file, status, reason), group in groupby(results, _heading):
        rows = list(group)
        if status in (Status.DEFECT, Status.NOT_COMPARED):
            quantities = ", ".join(row.quantity for row in rows)
            shown.add_row(file, quantities, "", "", f"{status}: {reason}", style=STYLES[status])
            continue
        for row in rows:
            verdict = f"{status}: {reason}" if reason else str(status)
            cells = (_number(row.error), _number(row.tolerance), verdict)
            shown.add_row(file, row.quantity, *cells, style=STYLES[status])
    return shown


def summary(results: Sequence[Result]) -> dict[str, int]:
    """Count the results by status, those that did not occur too."""
    counts = Counter(result.status for result in results)
    return {str(status): counts[status] for status in Status}


def as_json(results: Sequence[Result]) -> dict[str, Any]:
    """Return plain values: whether all passed, counts by status, and every result."""
    return {
        "passed": not any(result.status is Status.FAIL for result in results),
        "counts": summary(results),
        "results": [dataclasses.asdict(result) for result in results],
    }


def _heading(result: Result) -> tuple[str, Status, str]:
    return result.file, result.status, result.reason


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.2g}"
