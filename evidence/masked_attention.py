"""Time and memory of the masked attention of training, both passes, in blocks and by its definition.

The definition holds N x N tensors for each head and lets autograd save them; the blocks are what training
runs. They take turns on the same random inputs in float32, heads of size 64, half of the keys dropped, under
the mask of unpadded rows. A time is the median of the repeats. Memory is the peak above the inputs. Run from
the repository's root:

    python -m evidence.masked_attention --output evidence/results/masked-attention.json
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import shlex
import statistics
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from dynamic_llava.bench.machine import seconds
from dynamic_llava.core.attention.blocked import masked_attention
from dynamic_llava.core.attention.definition import masked_softmax
from dynamic_llava.core.masks import causal
from dynamic_llava.environment import environment
from dynamic_llava.files import write_json

SIZE, SEED = 64, 0
Attention = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, float], Tensor]


def definition(q: Tensor, k: Tensor, v: Tensor, policy: Tensor, visible: Tensor, scaling: float) -> Tensor:
    """Attention as equation 6 reads."""
    return masked_softmax((q @ k.mT * scaling).masked_fill(~visible, -torch.inf), policy) @ v


CONTENDERS: dict[str, Attention] = {"definition": definition, "blocks": masked_attention}


def both_passes(attention: Attention, leaves: list[Tensor], visible: Tensor) -> None:
    """Compute the output and all gradients, and forget them."""
    q, k, v, policy = leaves
    out = attention(q, k, v, policy, visible, SIZE**-0.5)
    torch.autograd.grad(out.sum(), leaves)


def peak_bytes(device: torch.device, work: Callable[[], object]) -> int:
    """Return the most memory that ``work`` holds at once, above what is held before."""
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        work()
        return torch.cuda.max_memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        work()
    events = sorted(record.profiler.kineto_results.events(), key=lambda event: event.start_ns())
    return max(itertools.accumulate(event.nbytes() for event in events if event.name() == "[memory]"))


def measure(batch: int, heads: int, length: int, repeats: int, device: torch.device) -> dict[str, Any]:
    """Return time and memory of both contenders, and how they compare."""
    generator = torch.Generator().manual_seed(SEED)
    shape = (batch, heads, length, SIZE)
    drawn = [torch.randn(shape, generator=generator) for _ in range(3)]
    drawn.append((torch.rand(batch, length, generator=generator) < 0.5).float())
    leaves = [x.to(device).requires_grad_() for x in drawn]
    visible = causal(length, device)[None, None]
    works = {name: functools.partial(both_passes, run, leaves, visible) for name, run in CONTENDERS.items()}
    peaks = {name: peak_bytes(device, work) for name, work in works.items()}  # warms up as well
    times: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(repeats):
        for name, work in works.items():
            times[name].append(seconds(device, work))
    medians = {name: statistics.median(taken) for name, taken in times.items()}
    return {
        "batch": batch,
        "heads": heads,
        "tokens": length,
        **{
            name: {"seconds": medians[name], "times": times[name], "peak_bytes": peaks[name]}
            for name in works
        },
        "speed_up": medians["definition"] / medians["blocks"],
        "memory": peaks["blocks"] / peaks["definition"],
    }


def show(points: Iterable[dict[str, Any]]) -> Table:
    """Return the table of what was measured."""
    table = Table("heads", "tokens", *(f"{name}\n{unit}" for unit in ("s", "MB") for name in CONTENDERS))
    table.add_column("time")
    table.add_column("memory")
    for point in points:
        of_each = [point[name] for name in CONTENDERS]
        table.add_row(
            str(point["heads"]),
            str(point["tokens"]),
            *(f"{one['seconds']:.3f}" for one in of_each),
            *(f"{one['peak_bytes'] / 1e6:,.0f}" for one in of_each),
            f"1/{point['speed_up']:.1f}",
            f"1/{1 / point['memory']:.0f}",
        )
    return table


def main() -> int:
    """Measure every combination and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, nargs="+", default=[512, 1024, 2048])
    parser.add_argument("--heads", type=int, nargs="+", default=[8, 32])
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=5, help="timed runs of each contender")
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--json", action="store_true", help="print the result as JSON, without the table")
    parser.add_argument("--output", type=Path, help="also write the result to this JSON file")
    options = parser.parse_args()
    points = []
    shapes = list(itertools.product(options.heads, options.tokens))
    for heads, length in track(shapes, "measuring", console=Console(stderr=True), transient=True):
        points.append(measure(options.batch, heads, length, options.repeats, options.device))
    command = "python -m evidence.masked_attention " + shlex.join(sys.argv[1:])
    head = {"command": command, "seed": SEED}
    result = head | {"points": points} | environment(options.device)
    if options.output:
        write_json(options.output, result)
    if options.json:
        print(json.dumps(result))
    else:
        Console().print(show(points))
    return 0


if __name__ == "__main__":
    sys.exit(main())
