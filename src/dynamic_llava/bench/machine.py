"""What the machine can do: memory, read bandwidth, matrix products."""

from __future__ import annotations

import os
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

READ_BYTES = 2**30  # read at once to measure the bandwidth, less where memory is short
ATTEMPTS = 5  # the best of them counts


def synchronise(device: torch.device) -> None:
    """Wait until a GPU has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds(device: torch.device, work: Callable[[], object]) -> float:
    """Return how long ``work`` takes on ``device``."""
    synchronise(device)
    start = time.perf_counter()
    work()
    synchronise(device)
    return time.perf_counter() - start


def available_bytes(device: torch.device) -> int:
    """Return how much memory can still be taken."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    meminfo = Path("/proc/meminfo")
    if not meminfo.exists():
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    lines = (line.split() for line in meminfo.read_text(encoding="utf-8").splitlines())
    return next(int(parts[1]) * 1024 for parts in lines if parts[0] == "MemAvailable:")


def process_peak_bytes() -> int:
    """Return the most main memory that this process has held so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


@torch.inference_mode()
def read_bandwidth(device: torch.device) -> float:
    """Return bytes a second at which the device reads memory: a tensor too large for its caches."""
    size = min(READ_BYTES, available_bytes(device) // 4)
    numbers = torch.ones(size // 4, device=device)
    return numbers.nbytes / min(seconds(device, numbers.sum) for _ in range(ATTEMPTS))


@torch.inference_mode()
def matmul_rate(model: Any, tokens: int) -> float:
    """Return FLOPs a second of matrix products in the model's dtype, ``tokens`` rows by its own weights."""
    layer = model.model.language_model.layers[0]
    weights: list[Tensor] = [layer.self_attn.q_proj.weight, layer.mlp.gate_proj.weight]
    down: Tensor = layer.mlp.down_proj.weight
    x_NC = torch.ones(tokens, down.shape[0], dtype=down.dtype, device=down.device)

    def multiply() -> Tensor:
        return F.linear([F.linear(x_NC, weight) for weight in weights][-1], down)

    flops = 2 * tokens * sum(weight.numel() for weight in (*weights, down))
    return flops / min(seconds(down.device, multiply) for _ in range(ATTEMPTS))
