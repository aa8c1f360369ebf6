"""Turns the results of photo into the first part of docs/results.md, and its plot.

    python -m evidence.photo.pages

Reads from evidence/results ``photo.json`` (evidence.photo.table), ``photo-kept.json`` (evidence.photo.kept),
``photo-TASK-dense.json`` and ``photo-TASK-sparse.json`` (``dynamic-llava evaluate``). What has no file yet is
said to be missing.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
from evidence.photo.cells import IMAGE_METHODS, IMAGE_RATES, OUTPUT_METHODS, OUTPUT_RATES, PAIRED
from evidence.trainings.tables import markdown
from matplotlib.axes import Axes

from dynamic_llava.evaluation.tables import SCORES
from dynamic_llava.files import read_object, replacing

RESULTS = Path("evidence") / "results"
DOCUMENT = Path("docs") / "results.md"
PLOT = Path("docs") / "images" / "results" / "photo.png"
TEMPLATE = Path(__file__).with_name("results.md")
MARKS = re.compile(r"(<!-- photo -->\n).*?(<!-- /photo -->)", re.DOTALL)
MISSING = "Not measured yet."
LOWER = ("perplexity", "repetition")

Row = Mapping[str, Any]
Table = list[list[str]]


def write() -> None:
    """Write the part of the document, and the plot."""
    table = _read("photo")
    part = TEMPLATE.read_text(encoding="utf-8")
    for name, lines in {**measured(table), "splits": splits(), "kept": kept(_read("photo-kept"))}.items():
        part = part.replace(f"{{{name}}}", markdown(lines).rstrip() if lines else MISSING)
    for name, text in words(table).items():
        part = part.replace(f"{{{name}}}", text)
    if table:
        draw(table["rows"], PLOT)
    text = DOCUMENT.read_text(encoding="utf-8")
    with replacing(DOCUMENT) as partial:
        partial.write_text(MARKS.sub(lambda found: f"{found[1]}{part}{found[2]}", text), encoding="utf-8")


def words(table: Row) -> dict[str, str]:
    """Return what sentences of the template say of the table."""
    if not table:
        return {"pictures": "pictures", "batch": "ten"}
    counts = [f"{count} pictures of {task}" for task, count in table["pictures"].items()]
    return {"pictures": ", ".join(counts), "batch": str(table["batch_size"])}


def measured(table: Row) -> dict[str, Table]:
    """Return the tables that are made of evidence.photo.table's rows."""
    rows = table.get("rows", [])
    image = ("flickr8k cider", "daquar right", "long-answers perplexity")
    return {
        "headline": list(_headline(rows)),
        **{name: list(_by_image(rows, *name.split())) for name in image},
        **{f"output {score}": list(_by_output(rows, score)) for score in ("perplexity", "cider")},
        "both perplexity": list(_by_both(rows, "perplexity")),
        "cost": list(_costs(rows)),
    }


def _headline(rows: Sequence[Row]) -> Iterator[list[str]]:
    """Yield dense and learned beside each other, and how far apart they are."""
    shown = (
        ("flickr8k", "captions, BLEU-4", "bleu_4", {"image": "learned", "image_rate": 0.2}),
        ("flickr8k", "captions, CIDEr", "cider", {"image": "learned", "image_rate": 0.2}),
        ("daquar", "short answers, exactly right, %", "right", {"image": "learned", "image_rate": 0.2}),
        ("long-answers", "descriptions, perplexity", "perplexity", {"output": "learned", "output_rate": 0.5}),
        ("long-answers", "descriptions, CIDEr", "cider", {"output": "learned", "output_rate": 0.5}),
    )
    table = []
    for task, title, score, wanted in shown:
        dense, sparse = find(rows, task), find(rows, task, **wanted)
        if dense and sparse:
            kept = f"{sparse['image_tokens_kept']:.0%}, {sparse['output_tokens_kept']:.0%}"
            relative = _relative(dense[score], sparse[score])
            table.append([title, kept, _mean(dense, score), _mean(sparse, score), relative])
    if table:
        yield ["what", "image and output tokens kept", "dense", "learned", "difference, % (interval)"]
        yield from table


def _relative(dense: Any, sparse: Any) -> str:
    """Return a difference in percent of dense, with its interval where the score has one."""
    if not isinstance(dense, dict):  # BLEU is a number of all answers together
        return f"{100 * (sparse / dense - 1):+.1f}" if dense else ""
    compared = sparse["against_dense"]
    if "percent" not in compared:
        return ""
    low, high = compared["percent_interval_95"]
    return f"{compared['percent']:+.1f} ({low:+.1f} to {high:+.1f})"


def _by_image(rows: Sequence[Row], task: str, score: str) -> Iterator[list[str]]:
    if dense := find(rows, task):
        yield ["image tokens", *IMAGE_METHODS]
        yield ["all (dense)", _spread(dense, score), *[""] * (len(IMAGE_METHODS) - 1)]
    for rate in IMAGE_RATES:
        found = [find(rows, task, image=method, image_rate=rate) for method in IMAGE_METHODS]
        if any(found):
            yield [f"{rate:.0%}", *_compared(found, score)]


def _by_output(rows: Sequence[Row], score: str) -> Iterator[list[str]]:
    if dense := find(rows, "long-answers"):
        yield ["output tokens", *OUTPUT_METHODS]
        yield ["all (dense)", _spread(dense, score), *[""] * (len(OUTPUT_METHODS) - 1)]
    for rate in OUTPUT_RATES:
        found = [find(rows, "long-answers", output=method, output_rate=rate) for method in OUTPUT_METHODS]
        if any(found):
            yield [f"{rate:.0%}", *_compared(found, score)]


def _by_both(rows: Sequence[Row], score: str) -> Iterator[list[str]]:
    lines = []
    for rates in ((image, output) for image in IMAGE_RATES for output in OUTPUT_RATES):
        found = [
            find(rows, "long-answers", image=image, image_rate=rates[0], output=output, output_rate=rates[1])
            for image, output in PAIRED
        ]
        if any(found):
            lines.append([*(f"{rate:.0%}" for rate in rates), *_compared(found, score)])
    if lines:
        names = [image if image == output else f"{image} + {output}" for image, output in PAIRED]
        yield ["image tokens", "output tokens", *names]
        yield from lines


def _costs(rows: Sequence[Row]) -> Iterator[list[str]]:
    """Yield times and bytes of the learned choice and of smaller pictures."""
    shown = [find(rows, "long-answers")]
    shown += [
        find(rows, "long-answers", image=method, image_rate=rate)
        for method in ("learned", "downsample")
        for rate in IMAGE_RATES
    ]
    shown += [find(rows, "long-answers", output="learned", output_rate=rate) for rate in OUTPUT_RATES]
    shown += [
        find(rows, "long-answers", image="learned", image_rate=0.2, output="learned", output_rate=rate)
        for rate in OUTPUT_RATES
    ]
    if not any(shown):
        return
    yield [
        "kept", "prefill, ms", "a token, ms", "prefill, times faster", "decoder's prefill, times faster",
        "a token, times faster", "K/V held, MB", "allocated, MB",
    ]  # fmt: skip
    for row in filter(None, shown):
        times = [f"{row['prefill_ms']:.0f}", f"{row['token_ms']:.1f}"]
        faster = [f"{row[f'{part}_times_faster']:.2f}" for part in ("prefill", "decoder_prefill", "token")]
        held = [f"{row[name] / 1e6:.2f}" for name in ("kv_bytes", "kv_bytes_allocated")]
        yield [_title(row), *times, *faster, *held]


def splits() -> Table:
    """Return the table of whole test splits."""
    table = []
    for task in ("flickr8k", "daquar"):
        found = [_read(f"photo-{task}-{kind}") for kind in ("dense", "sparse")]
        if all(found):
            questions = f"{task}, {found[0]['questions']:,} questions"
            dense, sparse = (result["numbers"] for result in found)
            share = f"{sparse['image_tokens_kept']:.0%}"
            table += [
                [questions, label, f"{dense[score]:.1f}", f"{sparse[score]:.1f}", share]
                for score, label in SCORES.items()
                if score in dense
            ]
    return [["task", "percent", "dense", "learned", "image tokens kept"], *table] if table else []


def kept(result: Row) -> Table:
    """Return the table of what kept patches lie on."""
    if not result:
        return []
    table: dict[str, list[str]] = {}
    rates: dict[str, None] = {}
    for name, found in result["results"].items():
        policy, rate = name.split()
        rates[f"{float(rate):.0%}"] = None
        low, high = found["interval_95"]
        table.setdefault(policy, [policy]).append(f"{found['ratio']:.2f} ({low:.2f} to {high:.2f})")
    return [["image tokens kept", *rates], *table.values()]


def draw(rows: Sequence[Row], path: Path) -> None:
    """Draw the quality of long answers by the time of the prefill and by the bytes that are held."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure, panels = plt.subplots(1, 2, figsize=(10, 4), sharey=True, layout="constrained")
    dense = find(rows, "long-answers")
    axes: Axes
    for axes, (name, unit, label) in zip(
        panels,
        (("prefill_ms", 1.0, "prefill of a batch, ms"), ("kv_bytes", 1e6, "K/V held, MB an answer")),
        strict=True,
    ):
        for method in IMAGE_METHODS:
            found = [find(rows, "long-answers", image=method, image_rate=rate) for rate in IMAGE_RATES]
            points = [(row[name] / unit, row["perplexity"]["mean"]) for row in found if row]
            if points:
                axes.plot(*zip(*points, strict=True), marker="o", label=method)
        if dense:
            axes.plot(dense[name] / unit, dense["perplexity"]["mean"], "k*", markersize=12, label="dense")
        axes.set_xlabel(label)
    panels[0].set_ylabel("perplexity of descriptions")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right upper", frameon=False)
    with replacing(path) as partial:
        figure.savefig(partial, dpi=120)
    plt.close(figure)


def find(rows: Sequence[Row], task: str, **wanted: Any) -> Row:
    """Return the row of a task that drops just this; an empty one if there is none."""
    whole = {"image": "", "image_rate": 1.0, "output": "", "output_rate": 1.0, "task": task}
    sought = whole | wanted
    return next((row for row in rows if all(row[name] == value for name, value in sought.items())), {})


def _compared(found: Sequence[Row], score: str) -> list[str]:
    """Return cells, the best in bold, and ≈ before those that may be level with the learned choice."""
    best = (min if score in LOWER else max)(row[score]["mean"] for row in found if row)
    cells = []
    for row in found:
        if not row:
            cells.append("–")
            continue
        cell, compared = _spread(row, score), row[score].get("against_learned")
        if row[score]["mean"] == best:
            cell = f"**{cell}**"
        if compared and compared["interval_95"][0] <= 0 <= compared["interval_95"][1]:
            cell = f"≈ {cell}"
        cells.append(cell)
    return cells


def _spread(row: Row, score: str) -> str:
    low, high = row[score]["interval_95"]
    return f"{_mean(row, score)} ({low:.1f} to {high:.1f})"


def _mean(row: Row, score: str) -> str:
    value = row[score]["mean"] if isinstance(row[score], dict) else row[score]
    return f"{value:.1f}" if score not in LOWER else f"{value:.2f}"


def _title(row: Row) -> str:
    """Say what a row keeps."""
    kinds = ((row["image"], row["image_rate"], "image"), (row["output"], row["output_rate"], "output"))
    parts = [f"{method}, {rate:.0%} of the {kind} tokens" for method, rate, kind in kinds if rate < 1]
    return "; ".join(parts) or "all (dense)"


def _read(name: str) -> Row:
    path = RESULTS / f"{name}.json"
    return read_object(path) if path.is_file() else {}


if __name__ == "__main__":
    write()
