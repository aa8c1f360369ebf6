"""Turns evidence/results/evidence.json into the tables and plots of docs/results.md."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from evidence.trainings.methods import METHODS, OUTPUT_POLICIES
from evidence.trainings.plots import draw
from evidence.trainings.rows import Row, differ, rates_of, select, summary

from dynamic_llava.files import replacing

DOCUMENT = Path("docs") / "results.md"
PLOTS = Path("docs") / "images" / "results"


def write(result: dict[str, Any]) -> None:
    """Write every table whose rows ``result`` has between its marks in the document, and the plots."""
    rows = result.get("policies", {}).get("rows", [])
    trained = result.get("ablations", {}).get("rows", [])
    tables: dict[str, list[list[str]]] = {}
    for model in dict.fromkeys(row["model"] for row in rows):
        own = [row for row in rows if row["model"] == model]
        tables[f"accuracy, {model}"] = _accuracies(own)
        tables[f"perplexity, {model}"] = _perplexities(own)
        tables[f"output tokens, {model}"] = _outputs(own)
    if rows:
        draw(rows, PLOTS)
    if trained:
        changes = result["ablations"]["variants"]
        tables["training"] = _variants(trained, changes)
        tables["course"] = _courses(result["ablations"]["courses"])
        tables["dial"] = _dial(trained, changes)
    if "cost" in result:
        tables["cost"] = _costs(result["cost"]["steps"])
    text = DOCUMENT.read_text(encoding="utf-8")
    for name, table in tables.items():
        mark = re.compile(rf"(<!-- table: {name} -->\n).*?(<!-- end -->)", re.DOTALL)
        text = mark.sub(lambda found, table=table: found[1] + markdown(table) + found[2], text)  # type: ignore[misc]
    with replacing(DOCUMENT) as partial:
        partial.write_text(text, encoding="utf-8")


def _cell(values: Sequence[float], digits: int) -> str:
    if not values:
        return "–"
    mean, reach = summary(values)
    return f"{mean:.{digits}f} ± {reach:.{digits}f}"


def _best(values: Sequence[Sequence[float]], digits: int, highest: bool) -> list[str]:
    """Return cells, the best mean in bold, and a ≈ before those whose difference from it may be chance."""
    best = (max if highest else min)((found for found in values if found), key=fmean)
    cells = [_cell(found, digits) for found in values]
    for place, found in enumerate(values):
        if found is best:
            cells[place] = f"**{cells[place]}**"
        elif found and not differ(found, best):
            cells[place] = f"≈ {cells[place]}"
    return cells


def _accuracies(rows: list[Row]) -> list[list[str]]:
    dense = _cell(select(rows, method="dense", kind="accuracy"), 1)
    table = [["image tokens kept", *METHODS], ["all (dense)", dense, *[""] * (len(METHODS) - 1)]]
    for rate in rates_of(rows, "image_keep_rate"):
        found = [select(rows, method=name, kind="accuracy", image_keep_rate=rate) for name in METHODS]
        table.append([f"{rate:.0%}", *_best(found, 1, highest=True)])
    return table


def _perplexities(rows: list[Row]) -> list[list[str]]:
    dense = _cell(select(rows, method="dense", kind="perplexity"), 4)
    table = [
        ["image tokens", "output tokens", *METHODS],
        ["all", "all (dense)", dense, *[""] * (len(METHODS) - 1)],
    ]
    for image in rates_of(rows, "image_keep_rate"):
        for text in rates_of(rows, "text_keep_rate"):
            wanted = {"kind": "perplexity", "image_keep_rate": image, "text_keep_rate": text}
            found = [select(rows, method=name, **wanted) for name in METHODS]
            table.append([f"{image:.0%}", f"{text:.0%}", *_best(found, 4, highest=False)])
    return table


def _outputs(rows: list[Row]) -> list[list[str]]:
    table = [["output tokens", *OUTPUT_POLICIES]]
    for text in rates_of(rows, "text_keep_rate"):
        wanted = {"kind": "perplexity", "image_keep_rate": 0.2, "text_keep_rate": text}
        found = [select(rows, method=f"learned image, {policy}", **wanted) for policy in OUTPUT_POLICIES]
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
    table = [
        ["training", "gradient norm", "greatest", "image tokens, early", "image tokens", "output tokens"]
    ]
    for name, row in courses.items():
        norms = [f"{row[key]:,.{1 if row[key] < 100 else 0}f}" for key in ("grad_norm", "greatest_grad_norm")]
        kept = [f"{row[key]:.1%}" for key in ("image_kept_early", "image_kept", "text_kept")]
        table.append([name, *norms, *kept])
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
    titles = {"accuracy": "short answers", "perplexity": "perplexity"}
    trainings = {
        f"for that rate alone, lambda {weight:g}": {
            _trained_for(changed): name
            for name, changed in changes.items()
            if changed == _apart(_trained_for(changed), weight)
        }
        for weight in (100.0, 10.0)
    }
    for name, changed in changes.items():
        if name == "base" or "image_rates" in changed:
            trainings[name] = dict.fromkeys(rates, name)
    table = [["training", *(f"{titles[kind]}, {rate:.0%}" for kind, _ in kinds for rate in rates)]]
    for title, names in trainings.items():
        found = [
            _cell(select(rows, method=names.get(rate), kind=kind, image_keep_rate=rate), digits)
            for kind, digits in kinds
            for rate in rates
        ]
        table.append([title, *found])
    return table


def _apart(rate: float, weight: float) -> dict[str, Any]:
    """Return what a variant changes that is trained for one rate, with one weight of the ratio loss."""
    changed = {"image_keep_rate": rate, "ratio_weight": weight}
    usual = {"image_keep_rate": 0.2, "ratio_weight": 100.0}
    sparsity = {name: value for name, value in changed.items() if value != usual[name]}
    return {"sparsity": sparsity} if sparsity else {}


def _trained_for(changed: dict[str, Any]) -> float:
    """Return the share of image tokens that a variant of base was trained for."""
    return float(changed.get("sparsity", {}).get("image_keep_rate", 0.2))


def markdown(table: list[list[str]]) -> str:
    """Return the lines of a table, its first row the heading."""
    lines = ["| " + " | ".join(row) + " |" for row in table]
    lines.insert(1, "|-" * len(table[0]) + "|")
    return "\n".join(lines) + "\n"
