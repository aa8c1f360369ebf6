"""Draws what decoding took: time and memory along the answer, throughput by batch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from dynamic_llava.files import replacing

Result = Mapping[str, Any]


def draw_plots(result: Result, folder: Path) -> list[Path]:
    """Write the plots of a run's decoding as PNG files; return their paths: none if nothing was decoded."""
    points = result["phases"].get("decode", [])
    if not points:
        return []
    longest = max((p for p in points if p["batch"] == points[0]["batch"]), key=lambda p: p["output_tokens"])
    paths = [folder / "time-per-token.png", folder / "cache-bytes.png"]
    with _axes(paths[0], result, "context, tokens a row", "ms per output token") as axes:
        _time_per_token(axes, longest)
    with _axes(paths[1], result, "output tokens a row", "K/V cache, MB") as axes:
        _cache_bytes(axes, longest)
    if len({point["batch"] for point in points}) > 1:
        paths.append(folder / "throughput.png")
        with _axes(paths[2], result, "batch, rows", "output tokens a second") as axes:
            _throughput(axes, [p for p in points if p["output_tokens"] == longest["output_tokens"]])
    return paths


def _time_per_token(axes: Axes, point: Result) -> None:
    for name, row in point["contenders"].items():
        chunks = row["chunks"]
        axes.plot([c["context"] for c in chunks], [c["ms_per_token"] for c in chunks], ".-", label=name)
    axes.set_title(f"batch {point['batch']}", loc="right", fontsize="medium")


def _cache_bytes(axes: Axes, point: Result) -> None:
    for number, (name, row) in enumerate(point["contenders"].items()):
        width = max(1.0, 4.0 - number)  # many lines coincide: thin ones on top of thick ones
        tokens = [chunk["output_tokens"] for chunk in row["chunks"]]
        allocated, held = (
            [chunk[f"cache_bytes_{kind}"] / 1e6 for chunk in row["chunks"]] for kind in ("allocated", "held")
        )
        (line,) = axes.plot(tokens, allocated, label=name, linewidth=width)
        axes.plot(tokens, held, ":", color=line.get_color())
    axes.set_title(f"batch {point['batch']}; dotted: in use", loc="right", fontsize="medium")


def _throughput(axes: Axes, points: list[Result]) -> None:
    for name in points[0]["contenders"]:
        rates = [1e3 * point["batch"] / point["contenders"][name]["ms_per_token"] for point in points]
        axes.plot([point["batch"] for point in points], rates, "o-", label=name)
    axes.set_xticks([point["batch"] for point in points])
    axes.set_title(f"{points[0]['output_tokens']} output tokens", loc="right", fontsize="medium")


@contextmanager
def _axes(path: Path, result: Result, x: str, y: str) -> Iterator[Axes]:
    """Yield the axes of a plot from zero on, written to ``path`` at the end."""
    figure = Figure(figsize=(7, 4.2), layout="constrained")  # without pyplot: no display, no global state
    axes = figure.add_subplot(xlabel=x, ylabel=y)
    yield axes
    settings = result["settings"]
    axes.set_title(f"{settings['model']}, {settings['dtype']}, {settings['device']}", loc="left")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    figure.legend(loc="outside right upper", frameon=False)
    with replacing(path) as partial:
        figure.savefig(partial, dpi=150)
