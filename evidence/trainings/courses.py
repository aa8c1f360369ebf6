"""How steadily a variant trained: its gradient norms, and the keep rates that it settled at."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import fmean, median

EARLY, LAST = slice(20, 60), slice(-50, None)  # steps whose keep rates are averaged


def course(log: Path) -> dict[str, float]:
    """Summarise a training's log: gradient norms of all steps, keep rates early on and at the end."""
    steps = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    steps = [step for step in steps if "grad_norm" in step]
    norms = [step["grad_norm"] for step in steps]
    return {
        "steps": len(steps),
        "grad_norm": median(norms),
        "greatest_grad_norm": max(norms),
        "image_kept_early": fmean(step["image_kept"] for step in steps[EARLY]),
        "image_kept": fmean(step["image_kept"] for step in steps[LAST]),
        "text_kept": fmean(step["text_kept"] for step in steps[LAST]),
    }
