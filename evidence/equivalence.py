"""Count how often a ragged batch answers as its rows do alone, and a run without a cache as one with.

Random tiny models and prompts, greedy, float32; every model, batch and predictor is a new one. Tokens must be
equal, all of them. Run from the repository's root, five minutes on two cores:

    python -m evidence.equivalence --output evidence/results/equivalence.json
"""

from __future__ import annotations

import argparse
import json
import random
import shlex
import sys
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor

from dynamic_llava.environment import environment
from dynamic_llava.files import write_json
from evidence import tiny


def attached(seed: int) -> Any:
    """Return a random model with mixed decisions."""
    model = tiny.model(seed=seed, key_heads=random.Random(seed).choice((2, 4)))
    tiny.sparsifier(seed).attach(model)
    return model


def draw_rows(seed: int, rows: int) -> list[dict[str, Tensor]]:
    """Prompts of 1 to 80 text tokens and 0 to 3 pictures."""
    rng = random.Random(seed)
    return [tiny.row(rng.randint(1, 80), rng.randint(0, 3), seed * 10 + i) for i in range(rows)]


def answer(model: Any, inputs: dict[str, Tensor], steps: int, use_cache: bool = True) -> Tensor:
    """Generate ``steps`` tokens for each row."""
    out: Tensor = model.generate(**inputs, max_new_tokens=steps, do_sample=False, use_cache=use_cache)
    return out[:, -steps:]


def batch_equals_rows(seed: int, steps: int) -> bool:
    """Tell whether a batch of 1 to 6 rows gives the tokens of its rows alone."""
    model = attached(seed)
    rows = draw_rows(seed, random.Random(seed + 1).randint(1, 6))
    together = answer(model, tiny.batch(rows), steps)
    return all(torch.equal(answer(model, row, steps)[0], together[i]) for i, row in enumerate(rows))


def no_cache_equals_cached(seed: int, steps: int) -> bool:
    """Tell whether a batch of 1 to 3 rows gives the same tokens without a cache."""
    model = attached(seed)
    inputs = tiny.batch(draw_rows(seed, random.Random(seed + 1).randint(1, 3)))
    return torch.equal(answer(model, inputs, steps), answer(model, inputs, steps, use_cache=False))


def main() -> int:
    """Run both counts; the exit code is 1 if any case differs."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--batches", type=int, default=200, help="ragged batches against rows alone")
    parser.add_argument("--no-cache", type=int, default=100, help="runs without a cache against cached ones")
    parser.add_argument("--steps", type=int, default=48, help="new tokens of each answer")
    parser.add_argument("--output", type=Path, help="also write the result to this JSON file")
    options = parser.parse_args()
    checks = {
        "ragged batch = rows alone": (batch_equals_rows, range(options.batches)),
        "no cache = cached": (no_cache_equals_cached, range(10_000, 10_000 + options.no_cache)),
    }
    result: dict[str, Any] = {}
    for name, (check, seeds) in checks.items():
        bar = track(seeds, name, console=Console(stderr=True), transient=True)
        wrong = [seed for seed in bar if not check(seed, options.steps)]
        result[name] = {"equal": len(seeds) - len(wrong), "of": len(seeds), "different_seeds": wrong}
        print(f"{name}: {len(seeds) - len(wrong)} of {len(seeds)}")
    if options.output:
        command = "python -m evidence.equivalence " + shlex.join(sys.argv[1:])
        head = {"command": command, "steps": options.steps}
        write_json(options.output, head | {"numbers": result} | environment(torch.device("cpu")))
    print(json.dumps(result))
    return int(any(numbers["different_seeds"] for numbers in result.values()))


if __name__ == "__main__":
    with torch.no_grad():
        sys.exit(main())
