"""Shows a benchmark's result in a terminal: one table a phase."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from rich.table import Table

from dynamic_llava.benchmark.settings import BASELINES

Result = Mapping[str, Any]

TITLES = {
    "prefill": "Prefill, ms",
    "decode": "Decoding with a cache, ms per output token",
    "no-cache": "One step without a cache, ms",
    "generate": "model.generate, ms per output token",
}


def tables(result: Result) -> Iterator[Table]:
    """Lay out every phase of what :func:`~dynamic_llava.benchmark.run` returned."""
    for phase, points in result["phases"].items():
        if phase == "overhead":
            for part in ("prefill", "decode"):
                parts = [point | {"contenders": point[part]} for point in points]
                yield _table(f"Overhead of attaching: {TITLES[part]}", part, parts)
        else:
            yield _table(TITLES[phase], phase, points)


def remarks(result: Result) -> str:
    """Say how to read the tables, and what the machine can do."""
    ability = result["ability"]
    return (
        f"The machine reads {ability['read_bytes_per_second'] / 1e9:,.1f} GB/s and multiplies "
        f"{ability['matmul_flops_per_second'] / 1e9:,.0f} GFLOP/s. Times and speed-ups (x): median, "
        "least–greatest. Bound: the speed-up over dense that the counted work allows. Reached: the last "
        "speed-up / bound. Of rate, of bandwidth: the counted work at full speed / the time taken."
    )


def _table(title: str, phase: str, points: list[Result]) -> Table:
    names = [name for point in points for name in point["contenders"]]
    baselines = [name for name in BASELINES if name in names]
    table = Table(title=f"{title}; {points[0]['prompt_tokens']} tokens in the prompt", title_justify="left")
    for column in ("batch", *([] if phase == "prefill" else ["output tokens"])):
        table.add_column(column, justify="right")
    table.add_column("contender", no_wrap=True)
    for column in ("time", *(f"x {name}" for name in baselines), *_extra_columns(phase)):
        table.add_column(column, justify="right")
    for point in points:
        for name, row in point["contenders"].items():
            speedup = row["speedup"]
            table.add_row(
                str(point["batch"]),
                *([] if phase == "prefill" else [str(point["output_tokens"])]),
                name,
                _spread(row, 1e3),
                *(_spread(speedup[base]) if base in speedup else "" for base in baselines),
                *_extra_cells(phase, name, row),
            )
        table.add_section()
    return table


def _extra_columns(phase: str) -> list[str]:
    if phase == "generate":
        return ["outside of the model"]
    columns = ["bound", "reached", "of bandwidth" if phase == "decode" else "of rate"]
    kept = [] if phase == "prefill" else ["output kept"]
    return columns + kept + (["cache, MB", "in use, MB"] if phase == "decode" else [])


def _extra_cells(phase: str, name: str, row: Result) -> list[str]:
    if phase == "generate":
        return [_spread(row["outside"], 1e3)]
    shares = [] if name in BASELINES else [speedup["share_of_bound"] for speedup in row["speedup"].values()]
    reached = f"{shares[-1]:.0%}" if shares else ""
    cells = [f"{row['bound']:.2f}", reached, f"{row['roofline']:.0%}"]
    if phase != "prefill":
        cells.append(f"{row['kept_output_share']:.0%}")
    if phase == "decode":
        cells += [f"{row[key] / 1e6:,.1f}" for key in ("cache_bytes_allocated", "cache_bytes_held")]
    return cells


def _spread(values: Result, scale: float = 1.0) -> str:
    median, least, most = (values[key] * scale for key in ("median", "min", "max"))
    return f"{median:,.2f}\n{least:,.2f}–{most:,.2f}"
