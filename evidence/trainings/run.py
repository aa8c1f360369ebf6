"""Trains the variants, measures every method at every budget, and writes docs/results.md's numbers.

    python -m evidence.trainings.run            everything that is not there yet; hours on two cores
    python -m evidence.trainings.run --only policies      one part: policies, ablations or cost

What is done is kept in runs/results: a second call goes on where the first was stopped.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from evidence.trainings import cost, tables, training, variants
from evidence.trainings.cells import Measuring
from evidence.trainings.courses import course
from evidence.trainings.methods import METHODS, OUTPUT_POLICIES, Budget, Method
from evidence.trainings.variants import WORK

from dynamic_llava.environment import environment
from dynamic_llava.files import write_json

RESULT = Path("evidence") / "results" / "evidence.json"
SEEDS = (0, 1, 2)
IMAGE_RATES, TEXT_RATES = (0.05, 0.1, 0.2, 0.5), (0.2, 0.5, 0.8)
DIAL_RATES = (0.1, 0.2, 0.5)
DIALLED = "dial"
LEARNED_IMAGE = "learned image, "  # before the name of an output policy


def policies() -> dict[str, Any]:
    """Compare the methods at every budget: on the bundled weights, and on those trained over drawn rates."""
    rows: list[dict[str, Any]] = []
    for name in ("nano", DIALLED):
        model = Measuring(name)
        rows += [row | {"model": name} for seed in SEEDS for row in _compared(model, seed)]
    return {"rows": rows}


def _compared(model: Measuring, seed: int) -> Iterator[dict[str, Any]]:
    for kind in ("accuracy", "perplexity"):
        yield row_of("dense", kind, Budget(), seed, model.dense(kind, seed))
    for name, method in METHODS.items():
        for image in IMAGE_RATES:
            budget = Budget(image=image)
            yield row_of(name, "accuracy", budget, seed, model.cell("accuracy", name, method, budget, seed))
            for text in TEXT_RATES:
                budget = Budget(image, text)
                cell = model.cell("perplexity", name, method, budget, seed)
                yield row_of(name, "perplexity", budget, seed, cell)
    for text in TEXT_RATES:  # the choice of output tokens alone
        for policy in OUTPUT_POLICIES:
            budget, method, name = Budget(0.2, text), Method("learned", policy), LEARNED_IMAGE + policy
            yield row_of(
                name, "perplexity", budget, seed, model.cell("perplexity", name, method, budget, seed)
            )


def ablations(names: Sequence[str]) -> dict[str, Any]:
    """Compare the variants of training at the rates that they were trained for, and the dials at others."""
    learned = METHODS["learned"]
    rows: list[dict[str, Any]] = []
    for name in names:
        variant = Measuring(name)
        trained = variants.recipe(name, Path())["method"]["sparsity"]
        budgets = {Budget(trained["image_keep_rate"], 0.5)}
        dial = name == "base" or "image_rates" in variants.VARIANTS[name]
        budgets |= {Budget(rate, 0.5) for rate in DIAL_RATES if dial}
        for seed in SEEDS:
            for budget in sorted(budgets, key=lambda budget: budget.image):
                own = budget.image == trained["image_keep_rate"]
                for kind in ("accuracy", "perplexity", "exactness")[: 3 if own else 2]:
                    cell = variant.cell(kind, "learned", learned, budget, seed)
                    rows.append(row_of(name, kind, budget, seed, cell))
            for kind in ("accuracy", "perplexity"):
                cell = variant.dense(kind, seed)
                rows.append(row_of(f"{name}, dense", kind, Budget(), seed, cell))
    return {
        "rows": rows,
        "variants": {name: variants.VARIANTS[name] for name in names},
        "courses": {name: course(WORK / name / "log.jsonl") for name in names},
    }


def row_of(method: str, kind: str, budget: Budget, seed: int, cell: dict[str, Any]) -> dict[str, Any]:
    """Return a cell as a row of the result."""
    value = cell["perplexity"] if kind == "perplexity" else round(100 * cell["right"] / cell["total"], 4)
    return {
        "method": method, "kind": kind, "image_keep_rate": budget.image, "text_keep_rate": budget.text,
        "seed": seed, "value": value, "total": cell["total"],
        "image_tokens_kept": cell["image_tokens_kept"], "output_tokens_kept": cell["output_tokens_kept"],
    }  # fmt: skip


def merged(before: dict[str, Any], after: dict[str, Any]) -> dict[str, Any]:
    """Return ablations with those of ``before`` that ``after`` does not measure again."""
    again = after["variants"]
    kept = [row for row in before.get("rows", []) if row["method"].removesuffix(", dense") not in again]
    found = {name: before.get(name, {}) | after[name] for name in ("variants", "courses")}
    known = [name for name in variants.VARIANTS if name in found["variants"]]
    ordered = {part: {name: by_name[name] for name in known} for part, by_name in found.items()}
    return {"rows": kept + after["rows"], **ordered}


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument(
        "--only", choices=("policies", "ablations", "cost"), help="one part; the others stay as they are"
    )
    parser.add_argument(
        "--variants",
        nargs="*",
        choices=variants.VARIANTS,
        default=list(variants.VARIANTS),
        metavar="NAME",
        help=f"trainings; the others stay as they are. Default: all of {', '.join(variants.VARIANTS)}",
    )
    options = parser.parse_args()
    result = json.loads(RESULT.read_text(encoding="utf-8")) if RESULT.exists() else {}
    made = environment(torch.device("cpu"))
    if options.only in (None, "ablations"):  # first, for it trains the dial that is compared as a policy
        training.train(options.variants)
        result["ablations"] = merged(result.get("ablations", {}), ablations(options.variants)) | made
    if options.only in (None, "policies"):
        training.train([DIALLED])
        result["policies"] = policies() | made
    if options.only in (None, "cost"):
        training.train_dense()
        result["cost"] = {"steps": cost.measure(), **made}
    write_json(RESULT, {**result, "command": "make results", "seeds": list(SEEDS)})
    tables.write(result)


if __name__ == "__main__":
    os.chdir(Path(__file__).parents[2])
    main()
