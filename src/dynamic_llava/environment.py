"""The versions and the machine that a number was measured with."""

from __future__ import annotations

import os
import platform
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch


def environment(device: torch.device) -> dict[str, Any]:
    """Return the versions, the machine and the date that a result has to name."""
    packages = ("dynamic-llava", "torch", "transformers")
    return {
        "versions": {"python": platform.python_version(), **{name: version(name) for name in packages}},
        "machine": {
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
            "cpu": _cpu_name(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
        },
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def usable_device(name: torch.device | str) -> torch.device:
    """Return the device of that name.

    Raises
    ------
    ValueError
        If torch sees no such device on this machine.
    """
    accelerator = default_device()
    count = 0 if accelerator.type == "cpu" else torch.accelerator.device_count()
    choice = f"choose cpu or {accelerator.type}" if count else "choose cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"device is {name!r}, which torch does not know: {choice}") from error
    is_there = device.type == accelerator.type and (device.index or 0) < count
    if device.type != "cpu" and not is_there:
        raise ValueError(f"device is {str(name)!r}, but torch sees no such device here: {choice}")
    return device


def default_device() -> torch.device:
    """Return the accelerator, or the CPU where this machine has none."""
    return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")


def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.exists() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())
