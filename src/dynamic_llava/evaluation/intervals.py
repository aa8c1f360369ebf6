"""The interval around a measured share."""

from __future__ import annotations

import math


def accuracy(right: int, total: int) -> dict[str, float | int | list[float]]:
    """Return an accuracy with its counts and its 95 % Wilson interval, all in percent."""
    low, high = wilson(right, total)
    return {
        "accuracy": round(100 * right / total, 3),
        "right": right,
        "total": total,
        "interval_95": [round(100 * low, 3), round(100 * high, 3)],
    }


def wilson(right: int, total: int, z: float = 1.959964) -> tuple[float, float]:
    """Score interval of a binomial share (Wilson 1927), which stays inside [0, 1] at either end."""
    if not 0 <= right <= total or total == 0:
        raise ValueError(
            f"{right} right answers of {total}: count at least one, and no more right than asked"
        )
    share = right / total
    centre = share + z * z / (2 * total)
    reach = z * math.sqrt(share * (1 - share) / total + z * z / (4 * total * total))
    scale = 1 + z * z / total
    return max(0.0, (centre - reach) / scale), min(1.0, (centre + reach) / scale)
