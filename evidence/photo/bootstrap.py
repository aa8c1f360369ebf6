"""Intervals over pictures: a mean of scores, and how two methods differ on the same pictures.

A picture may have several scores, such as one a question: pictures are drawn, and all scores of each with it.

Legend: P pictures, D draws.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

DRAWS = 10_000
QUANTILES = (0.025, 0.975)

Scores = Sequence[Mapping[str, Any]]
"""Examples: each has the name of its ``image`` and numbers by the name of a score."""


def mean_of(examples: Scores, score: str) -> dict[str, Any]:
    """Return ``mean`` and ``interval_95`` of a score."""
    sums_P, counts_P = _by_picture(examples, score)
    return {
        "mean": _rounded(sums_P.sum() / counts_P.sum()),
        "interval_95": _interval(_drawn(sums_P, counts_P)),
    }


def difference(examples: Scores, base: Scores, score: str) -> dict[str, Any]:
    """Compare a score with that of ``base`` on the same pictures, paired.

    Returns
    -------
    dict
        ``difference`` and ``interval_95``; ``percent`` of the mean of ``base`` and ``percent_interval_95``,
        where that mean is not zero.

    Raises
    ------
    ValueError
        If the two are about other pictures.
    """
    if [example["image"] for example in examples] != [example["image"] for example in base]:
        raise ValueError("the two were measured on other pictures: only the same ones can be compared")
    (ours_P, counts_P), (theirs_P, _) = (_by_picture(each, score) for each in (examples, base))
    ours_D, theirs_D = _drawn(ours_P, counts_P), _drawn(theirs_P, counts_P)
    ours, theirs = ours_P.sum() / counts_P.sum(), theirs_P.sum() / counts_P.sum()
    found = {"difference": _rounded(ours - theirs), "interval_95": _interval(ours_D - theirs_D)}
    if theirs and theirs_D.all():
        found["percent"] = _rounded(100 * (ours / theirs - 1))
        found["percent_interval_95"] = _interval(100 * (ours_D / theirs_D - 1))
    return found


def _by_picture(examples: Scores, score: str) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return the sum of each picture's scores, and their number."""
    sums: dict[str, float] = {}
    counts: dict[str, int] = {}
    for example in examples:
        name = example["image"]
        sums[name] = sums.get(name, 0.0) + float(example[score])
        counts[name] = counts.get(name, 0) + 1
    return np.array(list(sums.values())), np.array(list(counts.values()), dtype=np.float64)


def _drawn(sums_P: NDArray[np.float64], counts_P: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the mean of each of `DRAWS` draws with replacement; the same draws for as many pictures."""
    pictures = len(sums_P)
    times_DP = np.random.default_rng(0).multinomial(pictures, [1 / pictures] * pictures, DRAWS)
    means_D: NDArray[np.float64] = (times_DP @ sums_P) / (times_DP @ counts_P)
    return means_D


def _interval(values_D: NDArray[np.float64]) -> list[float]:
    return [_rounded(value) for value in np.quantile(values_D, QUANTILES)]


def _rounded(value: float) -> float:
    return round(float(value), 4)
