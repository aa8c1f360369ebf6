"""Turns benchmarks/results/evidence.json into the tables and plots of docs/results.md."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from benchmarks.evidence.methods import METHODS as OWN

from dynamic_llava.files import replacing

METHODS = (*OWN, "learned, dial")
DOCUMENT = Path("docs") / "results.md"
PLOTS = Path("docs") / "images" / "results"
STUDENT_95 = {1: 0.0, 2: 12.706, 3: 4.303}  # two-sided quantile of t for the mean of n values
Row = dict[str, Any]
Key = Callable[[Row], Any]


def write(result: dict[str, Any]) -> None:
    """Write every table whose rows ``result`` has between its marks in the document, and the plots."""
    rows = result.get("policies", {}).get("rows", [])
    trained = result.get("ablations", {}).get("rows", [])
    tables: dict[str, list[list[str]]] = {}
    if rows:
        tables["accuracy"] = _accuracies(rows)
        tables["perplexity"] = _perplexities(rows)
        tables["output tokens"] = _outputs(rows)
        _plot(rows)
    if trained:
        changes = result["ablations"]["variants"]
        tables["training"] = _variants(trained, changes)
        tables["course"] = _courses(result["ablations"]["courses"])
        tables["dial"] = _dial(trained, changes)
    if "cost" in result:
        tables["cost"] = _costs(result["cost"])
    text = DOCUMENT.read_text(encoding="utf-8")
    for name, table in tables.items():
        mark = re.compile(rf"(<!-- table: {name} -->\n).*?(<!-- end -->)", re.DOTALL)
        text = mark.sub(lambda found, table=table: found[1] + _markdown(table) + found[2], text)  # type: ignore[misc]
    with replacing(DOCUMENT) as partial:
        partial.write_text(text, encoding="utf-8")


def summary(values: Sequence[float]) -> tuple[float, float]:
    """Return the mean over seeds and the half-width of its 95 % interval (Student's t)."""
    spread = stdev(values) if len(values) > 1 else 0.0
    return fmean(values), STUDENT_95[len(values)] * spread / len(values) ** 0.5


def select(rows: Iterable[Row], **wanted: Any) -> list[float]:
    """Return the values of the rows that have all of ``wanted``, by seed."""
    found = [row for row in rows if all(row[name] == value for name, value in wanted.items())]
    return [row["value"] for row in sorted(found, key=lambda row: row["seed"])]


def _cell(values: Sequence[float], digits: int) -> str:
    if not values:
        return "–"
    mean, reach = summary(values)
    return f"{mean:.{digits}f} ± {reach:.{digits}f}"


def _best(values: Sequence[Sequence[float]], digits: int, highest: bool) -> list[str]:
    """Return cells with the best mean in bold."""
    means = [fmean(v) if v else (-1e9 if highest else 1e9) for v in values]
    best = max(means) if highest else min(means)
    cells = [_cell(v, digits) for v in values]
    return [f"**{cell}**" if mean == best else cell for cell, mean in zip(cells, means, strict=True)]


def _accuracies(rows: list[Row]) -> list[list[str]]:
    dense = _cell(select(rows, method="dense", kind="accuracy"), 1)
    table = [["image tokens kept", *METHODS], ["all (dense)", dense, *[""] * (len(METHODS) - 1)]]
    for rate in _rates(rows, "image_keep_rate"):
        found = [select(rows, method=name, kind="accuracy", image_keep_rate=rate) for name in METHODS]
        table.append([f"{rate:.0%}", *_best(found, 1, highest=True)])
    return table


def _perplexities(rows: list[Row]) -> list[list[str]]:
    dense = _cell(select(rows, method="dense", kind="perplexity"), 4)
    table = [
        ["image tokens", "output tokens", *METHODS],
        ["all", "all (dense)", dense, *[""] * (len(METHODS) - 1)],
    ]
    for image in _rates(rows, "image_keep_rate"):
        for text in _rates(rows, "text_keep_rate"):
            wanted = {"kind": "perplexity", "image_keep_rate": image, "text_keep_rate": text}
            found = [select(rows, method=name, **wanted) for name in METHODS]
            table.append([f"{image:.0%}", f"{text:.0%}", *_best(found, 4, highest=False)])
    return table


def _outputs(rows: list[Row]) -> list[list[str]]:
    policies = ("learned", "random", "uniform", "h2o", "streaming")
    table = [["output tokens", *policies]]
    for text in _rates(rows, "text_keep_rate"):
        wanted = {"kind": "perplexity", "image_keep_rate": 0.2, "text_keep_rate": text}
        found = [select(rows, method=f"learned image, {policy}", **wanted) for policy in policies]
        table.append([f"{text:.0%}", *_best(found, 4, highest=False)])
    return table


def _variants(rows: list[Row], changes: dict[str, dict[str, Any]]) -> list[list[str]]:
    table = [["training", "short answers", "its dense", "perplexity", "its dense", "exact descriptions"]]
    for name, changed in changes.items():
        rate, cells = _trained_for(changed), [name]
        for kind, digits in (("accuracy", 1), ("perplexity", 4), ("exactness", 1)):
            cells.append(_cell(select(rows, method=name, kind=kind, image_keep_rate=rate), digits))
            if kind != "exactness":
                cells.append(_cell(select(rows, method=f"{name}, dense", kind=kind), digits))
        table.append(cells)
    return table


def _courses(courses: dict[str, dict[str, float]]) -> list[list[str]]:
    table = [["training", "gradient norm", "greatest", "image tokens kept", "output tokens kept"]]
    for name, row in courses.items():
        norms = [f"{row[key]:,.{1 if row[key] < 100 else 0}f}" for key in ("grad_norm", "greatest_grad_norm")]
        table.append([name, *norms, f"{row['image_kept']:.1%}", f"{row['text_kept']:.1%}"])
    return table


def _costs(costs: dict[str, dict[str, float]]) -> list[list[str]]:
    table = [["training", "trained parameters", "seconds a step", "of full"]]
    for name, row in costs.items():
        spread = f"{row['seconds']:.2f} ({row['least']:.2f}–{row['greatest']:.2f})"
        table.append([name, f"{row['trained_parameters']:,}", spread, f"{row['of_base']:.0%}"])
    return table


def _dial(rows: list[Row], changes: dict[str, dict[str, Any]]) -> list[list[str]]:
    """Compare trainings for one rate with one for all, with half of the output tokens."""
    rates, kinds = (0.1, 0.2, 0.5), (("accuracy", 1), ("perplexity", 3))
    apart = [
        name for name in changes if name == "base" or "image_keep_rate" in changes[name].get("sparsity", {})
    ]
    trainings = {"for that rate alone": {_trained_for(changes[name]): name for name in apart}}
    for name, changed in changes.items():
        if name == "base" or "image_rates" in changed:
            trainings[name] = dict.fromkeys(rates, name)
    table = [["training", *(f"{kind}, {rate:.0%} of image tokens" for kind, _ in kinds for rate in rates)]]
    for title, names in trainings.items():
        found = [
            _cell(select(rows, method=names.get(rate), kind=kind, image_keep_rate=rate), digits)
            for kind, digits in kinds
            for rate in rates
        ]
        table.append([title, *found])
    return table


def _trained_for(changed: dict[str, Any]) -> float:
    """Return the share of image tokens that a variant of base was trained for."""
    return float(changed.get("sparsity", {}).get("image_keep_rate", 0.2))


def _rates(rows: list[Row], name: str) -> list[float]:
    return sorted({row[name] for row in rows} - {1.0})


def _markdown(table: list[list[str]]) -> str:
    lines = ["| " + " | ".join(row) + " |" for row in table]
    lines.insert(1, "|-" * len(table[0]) + "|")
    return "\n".join(lines) + "\n"


def _plot(rows: list[Row]) -> None:
    import matplotlib.pyplot as plt
    from matplotlib.figure import Figure
    from matplotlib.ticker import FixedLocator, NullFormatter

    PLOTS.mkdir(parents=True, exist_ok=True)
    figure: Figure
    for kind, axis, fixed in (
        ("accuracy", "image_keep_rate", {"text_keep_rate": 1.0}),
        ("perplexity", "text_keep_rate", {"image_keep_rate": 0.2}),
    ):
        figure, axes = plt.subplots(figsize=(7.5, 4), layout="constrained")
        places = _rates(rows, axis)
        for name in METHODS:
            found = [select(rows, method=name, kind=kind, **{axis: place}, **fixed) for place in places]
            if not all(found):
                continue
            means, reaches = zip(*(summary(values) for values in found), strict=True)
            axes.errorbar(
                [100 * place for place in places], means, reaches, marker="o", capsize=3, label=name
            )
        axes.axhline(
            fmean(select(rows, method="dense", kind=kind)), color="grey", linestyle=":", label="dense"
        )
        axes.set_xlabel(f"{'image' if kind == 'accuracy' else 'output'} tokens kept, %")
        axes.set_ylabel("right short answers, %" if kind == "accuracy" else "perplexity of descriptions")
        if kind == "perplexity":
            axes.set_yscale("log")
            axes.yaxis.set_major_locator(FixedLocator([1, 1.2, 1.5, 2, 3, 4]))
            axes.yaxis.set_major_formatter("{x:g}")
            axes.yaxis.set_minor_formatter(NullFormatter())
        figure.legend(loc="outside right upper", frameon=False)
        with replacing(PLOTS / f"{kind}.png") as partial:
            figure.savefig(partial, dpi=120)
        plt.close(figure)
