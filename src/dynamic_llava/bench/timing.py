"""Measuring in turns, and what the times say about each other."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from dynamic_llava.bench import machine
from dynamic_llava.bench.settings import BASELINES

Tick = Callable[[], None]


class Turns:
    """Runs contenders in turn, A B A B, and notes how long each takes.

    Parameters
    ----------
    device
        Where they compute.
    names
        Who takes part, in order.
    tick
        Called after each turn.

    Attributes
    ----------
    seconds
        Of each contender, in the order of the rounds.
    peak_bytes
        Most memory of a GPU that was taken while each one ran; empty without a GPU.
    """

    def __init__(self, device: torch.device, names: Sequence[str], tick: Tick) -> None:
        self.device, self.tick = device, tick
        self.seconds: dict[str, list[float]] = {name: [] for name in names}
        self.peak_bytes: dict[str, int] = {}

    def take(self, name: str, work: Callable[[], object]) -> None:
        """Run the turn of one contender."""
        on_gpu = self.device.type == "cuda"
        if on_gpu:
            torch.cuda.reset_peak_memory_stats(self.device)
        self.seconds[name].append(machine.seconds(self.device, work))
        if on_gpu:
            peak = torch.cuda.max_memory_allocated(self.device)
            self.peak_bytes[name] = max(peak, self.peak_bytes.get(name, 0))
        self.tick()

    def rounds(self, count: int, works: Mapping[str, Callable[[], object]]) -> None:
        """Warm every contender up once, then run so many rounds."""
        for work in works.values():
            machine.seconds(self.device, work)
        for _ in range(count):
            for name, work in works.items():
                self.take(name, work)

    def results(self) -> dict[str, dict[str, Any]]:
        """Return each contender's times, and how often faster than each baseline it was, round by round."""
        return {name: self._result(name) for name in self.seconds}

    def _result(self, name: str) -> dict[str, Any]:
        own = self.seconds[name]
        others = [other for other in BASELINES if other in self.seconds and other != name]
        result = {
            "seconds": own,
            **spread(own),
            "speedup": {
                other: spread([b / a for a, b in zip(own, self.seconds[other], strict=True)])
                for other in others
            },
        }
        return result | ({"peak_bytes": self.peak_bytes[name]} if name in self.peak_bytes else {})


def spread(values: Sequence[float]) -> dict[str, float]:
    """Return median, least and greatest."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def judge(result: dict[str, Any], bound: float, ideal_seconds: float) -> None:
    """Add to a contender's result what it could reach, and which share of that it did.

    Parameters
    ----------
    result
        One of :meth:`Turns.results`.
    bound
        The speed-up over dense that its work allows.
    ideal_seconds
        What one turn would take at the machine's full bandwidth, or its full rate of matrix products.
    """
    result["bound"] = bound
    for speedup in result["speedup"].values():
        speedup["share_of_bound"] = speedup["median"] / bound
    result["roofline"] = ideal_seconds / result["median"]
