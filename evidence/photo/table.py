"""Measures photo's table: methods of dropping tokens at several budgets, on photographs that no training saw.

    python -m evidence.photo.table photo ../shared/photos --output evidence/results/photo.json
    python -m evidence.photo.table MODEL ../shared/photos --output FILE --dry-run       (how long it takes)

Cells that are measured already are not measured again, so it goes on where it was stopped. All cells of a
task are about the same pictures. Times need a machine that does little else; how many times faster than dense
a cell is was measured in turn with dense, batch by batch.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from evidence.photo.bootstrap import difference, mean_of
from evidence.photo.cells import BATCH, PARTS, TASKS, Cell, Measuring, asked, plan
from evidence.trainings.cells import fingerprint

from dynamic_llava import load
from dynamic_llava.checkpoints.source import resolve
from dynamic_llava.environment import environment
from dynamic_llava.files import check_file, write_json

PICTURES = {"flickr8k": 200, "daquar": 100, "long-answers": 50}
SCORES = {
    "flickr8k": ("cider", "meteor", "rouge_l"),
    "daquar": ("right", "wups_0.9", "wups_0.0"),
    "long-answers": ("perplexity", "cider", "repetition"),
}


def rows(measuring: Measuring, cells: Sequence[Cell]) -> list[dict[str, Any]]:
    """Return a row for each cell: its numbers, and its scores with their intervals, paired where they differ.

    ``against_dense`` compares with the same model with nothing dropped, ``against_learned`` with the learned
    choice at the same budgets.
    """
    found = []
    for number, cell in enumerate(cells, start=1):
        print(f"{number} of {len(cells)}: {cell.task} {cell.name}", file=sys.stderr)
        measured = measuring(cell)
        scores = {score: mean_of(measured["examples"], score) for score in SCORES[cell.task]}
        for title, base in bases(cell).items():
            compared = measuring(base)["examples"]
            for score, its in scores.items():
                its[title] = difference(measured["examples"], compared, score)
        found.append({**asdict(cell), **measured["numbers"], **scores})
    return found


def bases(cell: Cell) -> dict[str, Cell]:
    """Return what a cell is compared with."""
    whole = Cell(cell.task)
    learned = replace(
        cell,
        image="learned" if cell.image_rate < 1 else "",
        output="learned" if cell.output_rate < 1 else "",
    )
    named = {"against_dense": whole, "against_learned": learned}
    return {title: base for title, base in named.items() if cell not in (whole, base)}


def forecast(measuring: Measuring, cells: Sequence[Cell]) -> dict[str, float]:
    """Return the minutes that missing cells take, by task, judged by a batch of each task.

    Each cell is taken for a dense one, or for one that reads references token by token if it gives up earlier
    tokens; sparse cells are a little faster.
    """
    minutes: dict[str, float] = {}
    seconds: dict[Cell, float] = {}
    for cell in cells:
        if not measuring.path(cell).exists():
            steps = cell.output in ("h2o", "streaming")
            kind = Cell(cell.task, output="streaming", output_rate=0.5) if steps else Cell(cell.task)
            if kind not in seconds:
                seconds[kind] = measuring.seconds(kind)
            minutes[cell.task] = minutes.get(cell.task, 0.0) + seconds[kind] / 60
    return minutes


def main() -> None:
    """Measure, or say how long it would take."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", help="photo, or a folder of a checkpoint with predictors")
    parser.add_argument("photos", type=Path, help="folder with flickr8k/ and daquar/")
    parser.add_argument("--output", type=Path, required=True, help="JSON file of the table")
    for task, count in PICTURES.items():
        parser.add_argument(
            f"--{task}",
            type=int,
            default=count,
            metavar="PICTURES",
            help=f"default: {count}; 0: leave it out",
        )
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="default: all")
    parser.add_argument("--work", type=Path, default=Path("runs/photo/table"), help="folder of the cells")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    parser.add_argument("--seed", type=int, default=0, help="of random dropping")
    parser.add_argument("--dry-run", action="store_true", help="measure a batch, say how long all takes")
    given = parser.parse_args()
    check_file("--output", given.output)
    counts = {task: getattr(given, task.replace("-", "_")) for task in TASKS}
    tasks = [task for task in TASKS if counts[task]]
    cells = plan(tasks, given.parts)
    questions = {task: asked(task, given.photos, counts[task]) for task in tasks}
    folder = given.work / f"{fingerprint(resolve(given.model))}-{given.dtype}"
    model, processor = load(given.model, dtype=getattr(torch, given.dtype))
    assert processor is not None  # photo's checkpoints have one
    measuring = Measuring(model, processor, questions, folder, given.seed)
    if given.dry_run:
        minutes = forecast(measuring, cells)
        for task, needed in minutes.items():
            print(f"{task}: {needed:.0f} minutes")
        print(f"{len(cells)} cells, {sum(minutes.values()):.0f} minutes left")
        return
    result = {
        "command": shlex.join(["python", "-m", "evidence.photo.table", *sys.argv[1:]]),
        "model": given.model,
        "weights": fingerprint(resolve(given.model)),
        "dtype": given.dtype,
        "seed": given.seed,
        "batch_size": BATCH,
        "pictures": {task: len({q.picture for q in questions[task]}) for task in tasks},
        "questions": {task: len(questions[task]) for task in tasks},
        "rows": rows(measuring, cells),
        **environment(model.device),
    }
    write_json(given.output, result)
    print(f"written: {given.output}", file=sys.stderr)


if __name__ == "__main__":
    main()
