"""Several threads ask one attached model at once; every answer is compared with that of the same call alone.

Calls differ in pictures, prompts, number of rows and length; every fifth one runs without a cache. Equal
means: the same tokens, and what ``sparsifier.report`` then says in the calling thread (``image_kept``,
``text_kept``, ``kv_lengths``) the same too. Greedy, float32, one thread of torch in each. Two minutes on two
cores:

    python -m evidence.threads --output evidence/results/threads.json
"""

from __future__ import annotations

import argparse
import random
import shlex
import sys
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor

import dynamic_llava
from dynamic_llava.environment import environment
from dynamic_llava.evaluation import tasks
from dynamic_llava.evaluation.batches import encode_questions
from dynamic_llava.files import write_json
from evidence import tiny

WITHOUT_CACHE = 5  # every so many calls
SWITCH = 1e-4  # seconds after which Python lets another thread go on; its default is 50 times that


@dataclass(frozen=True)
class Call:
    """One call of ``generate``."""

    inputs: dict[str, Any]
    options: dict[str, Any]


@dataclass(frozen=True)
class Answer:
    """What a call returned, and what the report of its thread said then."""

    tokens: Tensor
    image_kept: list[Tensor]
    text_kept: list[Tensor]
    kv_lengths: Tensor

    def differs(self, other: Answer) -> str:
        """Return the name of the first part that differs, or nothing."""
        for name in ("tokens", "image_kept", "text_kept", "kv_lengths"):
            own, others = (as_list(getattr(answer, name)) for answer in (self, other))
            if len(own) != len(others) or not all(map(torch.equal, own, others)):
                return name
        return ""


def as_list(tensors: Tensor | list[Tensor]) -> list[Tensor]:
    """Return a tensor as a list of one."""
    return [tensors] if isinstance(tensors, Tensor) else tensors


def options(number: int, longest: int) -> dict[str, Any]:
    """Return the options of a call: its length, and whether it has a cache."""
    length = random.Random(number).randint(2, longest)
    return {
        "max_new_tokens": length,
        "do_sample": False,
        "use_cache": number % WITHOUT_CACHE != WITHOUT_CACHE - 1,
    }


def tiny_calls(count: int) -> list[Call]:
    """Return calls of the tiny random model: 1 to 3 rows with 0 to 2 pictures each."""
    calls = []
    for number in range(count):
        rng = random.Random(number)
        rows = [
            tiny.row(rng.randint(1, 30), rng.randint(0, 2), seed=3 * number + row)
            for row in range(rng.randint(1, 3))
        ]
        calls.append(Call(tiny.batch(rows), options(number, longest=40)))
    return calls


def nano_calls(processor: Any, count: int) -> list[Call]:
    """Return calls of nano: 1 to 3 questions or requests to describe on as many held-out scenes."""
    short, long = tasks.scene_questions(3 * count), tasks.scene_descriptions(3 * count)
    calls = []
    for number in range(count):
        rng = random.Random(number)
        asked = [rng.choice((short, long))[3 * number + row] for row in range(rng.randint(1, 3))]
        calls.append(Call(dict(encode_questions(processor, asked)), options(number, longest=40)))
    return calls


def answer(model: Any, call: Call) -> Answer:
    """Run a call in this thread."""
    tokens = model.generate(**call.inputs, **call.options)
    report = model.sparsifier.report
    return Answer(tokens, report.image_kept, report.text_kept, report.kv_lengths)


def together(
    model: Any, calls: Sequence[Call], threads: int, tick: Callable[[], object] = lambda: None
) -> list[Answer | Exception]:
    """Run calls in so many threads at once, an equal share in each; return answers or errors in order."""
    start = threading.Barrier(threads)
    found: list[Answer | Exception] = [RuntimeError("not run")] * len(calls)

    def work(first: int) -> None:
        torch.set_num_threads(1)  # holds for the thread that calls it
        start.wait()
        for number in range(first, len(calls), threads):
            try:
                found[number] = answer(model, calls[number])
            except Exception as error:  # whatever it is, it is not the answer
                found[number] = error
            tick()

    interval = sys.getswitchinterval()
    sys.setswitchinterval(SWITCH)
    try:
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(work, range(threads)))
    finally:
        sys.setswitchinterval(interval)
    return found


def different(alone: Sequence[Answer | Exception], found: Sequence[Answer | Exception]) -> dict[int, str]:
    """Return what differs, by the number of the call; an error of a call alone is raised."""
    wrong: dict[int, str] = {}
    for number, (wanted, got) in enumerate(zip(alone, found, strict=True)):
        if isinstance(wanted, Exception):
            raise wanted
        if what := repr(got) if isinstance(got, Exception) else got.differs(wanted):
            wrong[number] = what
    return wrong


def compare(name: str, model: Any, calls: Sequence[Call], threads: int) -> dict[str, Any]:
    """Run calls alone, then in threads; return the counts."""
    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(name, total=2 * len(calls))
        alone, found = (together(model, calls, count, lambda: bar.advance(task)) for count in (1, threads))
    wrong = different(alone, found)
    return {"equal": len(calls) - len(wrong), "of": len(calls), "different": wrong}


def main() -> int:
    """Compare both models; the exit code is 1 if any call differs."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", type=int, default=8)
    parser.add_argument("--calls", type=int, default=20, help="of each thread")
    parser.add_argument("--output", type=Path, help="also write the result to this JSON file")
    given = parser.parse_args()
    count = given.threads * given.calls
    nano, processor = dynamic_llava.load("nano", dtype=torch.float32)
    random_one = tiny.model()
    tiny.sparsifier().attach(random_one)
    numbers = {
        "nano": compare("nano", nano, nano_calls(processor, count), given.threads),
        "tiny random model": compare("tiny", random_one, tiny_calls(count), given.threads),
    }
    table = Table("model", "threads", "calls", "equal to alone", "first difference")
    for name, result in numbers.items():
        first = next((f"call {number}: {what}" for number, what in result["different"].items()), "")
        table.add_row(name, str(given.threads), str(result["of"]), str(result["equal"]), first)
    if given.output:
        command = "python -m evidence.threads " + shlex.join(sys.argv[1:])
        head = {"command": command, "threads": given.threads, "calls_each": given.calls, "torch_threads": 1}
        write_json(given.output, head | {"numbers": numbers} | environment(torch.device("cpu")))
    Console(width=100).print(table)
    return int(any(result["different"] for result in numbers.values()))


if __name__ == "__main__":
    sys.exit(main())
