"""Draws the methods of docs/results.md by budget, beside each other for each set of weights."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

import matplotlib.pyplot as plt
from evidence.trainings.methods import METHODS
from evidence.trainings.rows import Row, rates_of, select, summary
from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator, NullFormatter

from dynamic_llava.files import replacing

TITLES = {"nano": "bundled weights", "dial": "trained over drawn rates"}


def draw(rows: Sequence[Row], folder: Path) -> None:
    """Write accuracy.png and perplexity.png, a panel for each model of ``rows``."""
    folder.mkdir(parents=True, exist_ok=True)
    models = list(dict.fromkeys(row["model"] for row in rows))
    for kind in ("accuracy", "perplexity"):
        figure, panels = plt.subplots(
            1,
            len(models),
            figsize=(1 + 4.5 * len(models), 4),
            sharey=True,
            squeeze=False,
            layout="constrained",
        )
        for model, axes in zip(models, panels[0], strict=True):
            _panel(axes, [row for row in rows if row["model"] == model], kind)
            axes.set_title(TITLES[model])
        panels[0][0].set_ylabel(
            "right short answers, %" if kind == "accuracy" else "perplexity of descriptions"
        )
        lines, labels = panels[0][0].get_legend_handles_labels()
        figure.legend(lines, labels, loc="outside right upper", frameon=False)
        with replacing(folder / f"{kind}.png") as partial:
            figure.savefig(partial, dpi=120)
        plt.close(figure)


def _panel(axes: Axes, rows: Sequence[Row], kind: str) -> None:
    axis, fixed = "image_keep_rate", {"text_keep_rate": 1.0}
    if kind == "perplexity":
        axis, fixed = "text_keep_rate", {"image_keep_rate": 0.2}
    rates = rates_of(rows, axis)
    for name in METHODS:
        found = [select(rows, method=name, kind=kind, **{axis: rate}, **fixed) for rate in rates]
        means, reaches = zip(*(summary(values) for values in found), strict=True)
        axes.errorbar([100 * rate for rate in rates], means, reaches, marker="o", capsize=3, label=name)
    axes.axhline(fmean(select(rows, method="dense", kind=kind)), color="grey", linestyle=":", label="dense")
    axes.set_xlabel(f"{'image' if kind == 'accuracy' else 'output'} tokens kept, %")
    if kind == "perplexity":
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(FixedLocator([1, 1.2, 1.5, 2, 3, 4]))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter(NullFormatter())
