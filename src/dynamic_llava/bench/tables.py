"""Shows a benchmark's result in a terminal of 80 columns: one table for each phase and workload."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from rich import box
from rich.table import Table

from dynamic_llava.bench.settings import BASELINES

Result = Mapping[str, Any]

TITLES = {
    "prefill": "Prefill",
    "decode": "Decoding with a cache, per output token",
    "no-cache": "One step without a cache",
    "generate": "model.generate, per output token",
}
HEADINGS = {"dense": "x\ndense", "static": "x\nstatic", "preallocated": "x pre-\nalloc."}


def tables(result: Result) -> Iterator[Table]:
    """Lay out every phase of what :func:`~dynamic_llava.bench.run` returned."""
    for phase, points in result["phases"].items():
        for point in points:
            if phase == "overhead":
                for part in ("prefill", "decode"):
                    title = f"Overhead of attaching: {TITLES[part]}"
                    yield _table(title, part, point | {"contenders": point[part]})
            else:
                yield _table(TITLES[phase], phase, point)


def remarks(result: Result) -> str:
    """Say how to read the tables, and what the machine can do."""
    ability = result["ability"]
    return (
        f"The machine reads {ability['read_bytes_per_second'] / 1e9:,.1f} GB/s and multiplies "
        f"{ability['matmul_flops_per_second'] / 1e9:,.0f} GFLOP/s. Times: median, least–greatest. "
        "x: how often faster than a baseline, median. Bound: the speed-up over dense that the counted work "
        "allows. Share of it: the last speed-up / bound. Of peak: the counted work at the machine's full "
        "speed / the time taken."
    )


def _table(title: str, phase: str, point: Result) -> Table:
    rows = point["contenders"]
    baselines = [name for name in BASELINES if name in rows]
    tokens = f"{point['prompt_tokens']:,} prompt"
    if phase != "prefill":
        tokens += f", {point['output_tokens']:,} output"
    table = Table(
        title=f"{title}: batch {point['batch']}, {tokens} tokens",
        title_justify="left",
        box=box.SIMPLE_HEAD,
        collapse_padding=True,
        pad_edge=False,
    )
    table.add_column("contender", no_wrap=True)
    for heading in ("ms", *(HEADINGS[name] for name in baselines), *_extra_headings(phase)):
        table.add_column(heading, justify="right")
    for name, row in rows.items():
        speedups = [row["speedup"].get(base, {}).get("median") for base in baselines]
        table.add_row(
            name,
            _spread(row),
            *("" if speedup is None else f"{speedup:.2f}" for speedup in speedups),
            *_extra_cells(phase, name, row),
        )
    return table


def _extra_headings(phase: str) -> list[str]:
    if phase == "generate":
        return ["outside of\nthe model"]
    headings = ["\nbound", "share\nof it", "of\npeak"]
    return headings + (["\nkept", "cache\nMB"] if phase == "decode" else [])


def _extra_cells(phase: str, name: str, row: Result) -> list[str]:
    if phase == "generate":
        return [_spread(row["outside"])]
    shares = [] if name in BASELINES else [speedup["share_of_bound"] for speedup in row["speedup"].values()]
    cells = [f"{row['bound']:.2f}", f"{shares[-1]:.0%}" if shares else "", f"{row['roofline']:.0%}"]
    if phase == "decode":
        cells += [f"{row['kept_output_share']:.0%}", f"{row['cache_bytes_allocated'] / 1e6:,.1f}"]
    return cells


def _spread(values: Result) -> str:
    """Return median, least and greatest of seconds, in ms."""
    median, least, most = (1e3 * values[key] for key in ("median", "min", "max"))
    digits = 0 if median >= 1000 else 1 if median >= 100 else 2
    fewer = max(0, digits - 1)
    return f"{median:,.{digits}f}\n{least:,.{fewer}f}–{most:,.{fewer}f}"
