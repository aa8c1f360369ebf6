"""Measure the committed weights of nano anew, and compare: what docs/results.md shows, and single decisions.

The same questions are asked with the library of an earlier commit and with today's: answers, kept image
tokens and kept output tokens must be equal, one by one. Then the rows of nano in evidence.json are measured:
accuracy and kept shares must be equal, perplexity within 1e-4. 20 minutes on two cores, 2 for the short set;
rows stay in runs/results until the library's code changes, so that a call goes on where another stopped:

    python -m evidence.remeasure --output evidence/results/remeasured.json
    python -m evidence.remeasure --short
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
import tempfile
from collections.abc import Iterable, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

# Before torch is imported: where threads spin while they wait, a busy machine is several times slower.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
from evidence.revisions import BASE, ROOT, Side, checked_out, described
from evidence.trainings.cells import Measuring
from evidence.trainings.methods import METHODS, Budget, Method
from evidence.trainings.run import LEARNED_IMAGE, RESULT, row_of
from evidence.trainings.variants import WORK
from rich.console import Console
from rich.progress import track
from rich.table import Table

import dynamic_llava
from dynamic_llava.environment import environment
from dynamic_llava.evaluation import tasks
from dynamic_llava.evaluation.batches import encode_questions
from dynamic_llava.files import write_json

TOLERANCE = 1e-4  # of a perplexity
EXACT = ("total", "image_tokens_kept", "output_tokens_kept")
IMAGE_RATE, TEXT_RATE = 0.2, 0.5  # of the answers that are compared one by one, and of the short set of rows
PICTURES, SHORT_PICTURES, ROWS, LONGEST = 60, 20, 10, 70  # LONGEST: tokens of an answer
COMPARED = {  # image policy, output policy
    "learned": ("learned", "learned"),
    "random": ("random", "random"),
    "uniform": ("uniform", "uniform"),
    "fastv + h2o": ("fastv", "h2o"),
    "learned image, streaming": ("learned", "streaming"),
}


# Rows


def committed(short: bool, seeds: Sequence[int]) -> list[dict[str, Any]]:
    """Return the rows of nano that were committed; ``short``: the first seed at one budget, and dense."""
    result = json.loads((ROOT / RESULT).read_text(encoding="utf-8"))
    rows = [row for row in result["policies"]["rows"] if row["model"] == "nano"]
    if not short:
        return [row for row in rows if row["seed"] in seeds]
    wanted = {(1.0, 1.0), (IMAGE_RATE, 1.0), (IMAGE_RATE, TEXT_RATE)}
    return [
        row for row in rows if row["seed"] == 0 and (row["image_keep_rate"], row["text_keep_rate"]) in wanted
    ]


def measured(model: Measuring, row: dict[str, Any]) -> dict[str, Any]:
    """Return a row as today's library measures it."""
    name, kind, seed = row["method"], row["kind"], row["seed"]
    budget = Budget(row["image_keep_rate"], row["text_keep_rate"])
    if name == "dense":
        return row_of(name, kind, budget, seed, model.dense(kind, seed))
    output = name.removeprefix(LEARNED_IMAGE)
    method = METHODS[name] if name in METHODS else Method("learned", output)
    return row_of(name, kind, budget, seed, model.cell(kind, name, method, budget, seed))


def difference(old: dict[str, Any], new: dict[str, Any]) -> float:
    """Return how far a row's value moved; infinity where anything but a perplexity did."""
    if any(old[name] != new[name] for name in EXACT):
        return float("inf")
    moved = abs(old["value"] - new["value"])
    return moved if old["kind"] == "perplexity" or moved == 0 else float("inf")


def compare_rows(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Measure rows anew; return the counts, the largest difference and every row that differs."""
    model = Measuring("nano", WORK / "remeasured" / library_fingerprint())
    found = []
    for number, row in enumerate(rows, 1):
        print(f"row {number} of {len(rows)}", file=sys.stderr)
        found.append(measured(model, row))
    moved = [difference(old, new) for old, new in zip(rows, found, strict=True)]
    beyond = [
        {"committed": old, "measured": new}
        for old, new, far in zip(rows, found, moved, strict=True)
        if far > TOLERANCE
    ]
    return {
        "of": len(rows),
        "equal": sum(far == 0 for far in moved),
        "within": len(rows) - len(beyond),
        "largest_perplexity_difference": max((far for far in moved if far <= TOLERANCE), default=0.0),
        "beyond": beyond,
    }


def library_fingerprint() -> str:
    """Return eight hexadecimal digits that change with the library's code."""
    digest = sha256()
    for path in sorted((ROOT / "src").rglob("*.py")):
        digest.update(path.relative_to(ROOT).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()[:8]


# Answers, one by one


def prompts(pictures: int) -> list[dict[str, Any]]:
    """Return batches of requests to describe held-out scenes, then of as many short questions."""
    _, processor = dynamic_llava.load("nano")
    assert processor is not None
    return [
        dict(encode_questions(processor, asked[start : start + ROWS]))
        for asked in (tasks.scene_descriptions(pictures), tasks.scene_questions(pictures)[:pictures])
        for start in range(0, pictures, ROWS)
    ]


def compare_answers(base: str, pictures: int) -> dict[str, Any]:
    """Ask both sides; return the counts of each method and what differs."""
    batches = prompts(pictures)
    result: dict[str, Any] = {}
    console = Console(stderr=True)
    with checked_out(base) as folder, tempfile.TemporaryDirectory() as room:
        file = Path(room) / "prompts.pt"
        torch.save(batches, file)
        command = ("evidence.answering", [str(file)])
        with Side(folder, *command) as old, Side(ROOT, *command) as new:
            for name, (image, text) in COMPARED.items():
                rows, wrong = 0, []
                numbers = range(len(batches))
                for number in track(
                    numbers, name, console=console, transient=True, disable=not console.is_terminal
                ):
                    asked = f"{number} {image} {IMAGE_RATE} {text} {TEXT_RATE} {LONGEST}"
                    pair = [side.ask(asked) for side in (old, new)]
                    for row, (wanted, got) in enumerate(zip(*pair, strict=True)):
                        rows += 1
                        if parts := [part for part in wanted if wanted[part] != got[part]]:
                            wrong.append({"batch": number, "row": row, "parts": parts})
                result[name] = {"equal": rows - len(wrong), "of": rows, "different": wrong}
    return result


# Both


def show(rows: dict[str, Any], answers: dict[str, Any]) -> Iterable[Table]:
    """Yield what differs among the rows, and the summary."""
    if rows["beyond"]:
        table = Table("row", "committed", "measured", "image tokens kept", "output tokens kept")
        for pair in rows["beyond"]:
            old, new = pair["committed"], pair["measured"]
            name = f"{old['method']}, {old['kind']}, {old['image_keep_rate']:g}/{old['text_keep_rate']:g}"
            kept = [f"{old[key]} {new[key]}" for key in EXACT[1:]]
            table.add_row(f"{name}, seed {old['seed']}", str(old["value"]), str(new["value"]), *kept)
        yield table
    table = Table("compared", "equal", f"within {TOLERANCE:g}", "of")
    table.add_row("rows of docs/results.md", str(rows["equal"]), str(rows["within"]), str(rows["of"]))
    for name, found in answers.items():
        table.add_row(f"answers and kept tokens, {name}", str(found["equal"]), "", str(found["of"]))
    yield table


def main() -> int:
    """Measure, compare and print the tables; the exit code is 1 where anything differs."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--short", action="store_true", help="one seed at one budget, and fewer pictures")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of the rows; 97 rows each")
    parser.add_argument("--base", default=BASE, help=f"commit whose answers are compared; default {BASE}")
    parser.add_argument("--output", type=Path, help="also write the result to this JSON file")
    options = parser.parse_args()
    answers = compare_answers(options.base, SHORT_PICTURES if options.short else PICTURES)
    rows = compare_rows(committed(options.short, options.seeds))
    if options.output:
        command = "python -m evidence.remeasure " + shlex.join(sys.argv[1:])
        head = {"command": command, "base": options.base, "now": described(), "tolerance": TOLERANCE}
        result = head | {"rows": rows, "answers": answers} | environment(torch.device("cpu"))
        write_json(options.output, result)
    for table in show(rows, answers):
        Console(width=110).print(table)
    return int(bool(rows["beyond"]) or any(found["different"] for found in answers.values()))


if __name__ == "__main__":
    sys.exit(main())
