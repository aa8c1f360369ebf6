"""Compares what the library computes with what a golden file holds, one result a quantity.

Legend: B batch, N tokens, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum

from torch import Tensor

from dynamic_llava.verification.files import GoldenFile

TOLERANCE = 2e-4  # activations of float32 models, the tolerance that comes with the golden vectors
DESCRIPTIONS = ("seed", "min_decision_margin")  # of how a file was made: nothing to compute


class Status(StrEnum):
    """What came of one quantity."""

    PASS = "pass"
    FAIL = "fail"
    DEFECT = "official defect, not reproduced"
    NOT_COMPARED = "not compared"


@dataclass(frozen=True)
class Result:
    """One quantity of one file.

    ``error`` is the largest absolute difference, or for exact quantities the number of entries that differ;
    None where nothing was computed or shapes differ, which ``reason`` then says.
    """

    file: str
    quantity: str
    status: Status
    error: float | None = None
    tolerance: float | None = None
    reason: str = ""


class Comparison:
    """Collects the results of one golden file.

    A quantity whose array the file does not hold is passed over: files may hold any subset.
    """

    def __init__(self, file: GoldenFile) -> None:
        self.file = file
        self.results: list[Result] = []

    def close(
        self,
        key: str,
        ours: Tensor,
        tolerance: float = TOLERANCE,
        *,
        where: Tensor | None = None,
        relative: bool = False,
        note: str = "",
    ) -> None:
        """Compare numbers with the array ``key``.

        Parameters
        ----------
        key
            Name of the array.
        ours
            Of the same shape.
        tolerance
            Largest difference that passes.
        where
            Bool, the leading dimensions: compare only there.
        relative
            Divide each difference by the expected number where that is above 1.
        note
            Tells apart two comparisons with one array.
        """
        if key in self.file:
            self.against(key + note, self.file[key], ours, tolerance, where=where, relative=relative)

    def exact(self, key: str, ours: Tensor, *, where: Tensor | None = None, note: str = "") -> None:
        """Compare whole numbers or decisions with the array ``key``: no entry may differ."""
        if key in self.file:
            self.against(key + note, self.file[key], ours, None, where=where)

    def positions(self, key: str, ours_BN: Tensor) -> None:
        """Compare position ids; a single row stands for all, on either side."""
        if key in self.file:
            expected_BN = self.file[key]
            rows = max(len(expected_BN), len(ours_BN))
            self.against(key, expected_BN.expand(rows, -1), ours_BN.expand(rows, -1), None)

    def logits(self, key: str, ours: Tensor, *, where: Tensor | None = None, note: str = "") -> None:
        """Compare logits ``[..., V]`` with the array ``key``, or with what stands for it in large files.

        These are the first 64 columns, the argmax and the logsumexp.
        """
        self.close(key, ours, where=where, note=note)
        self.close(f"{key}_first64", ours[..., :64], where=where, note=note)
        self.exact(f"{key}_argmax", ours.argmax(-1), where=where, note=note)
        self.close(f"{key}_logsumexp", ours.logsumexp(-1), where=where, note=note)

    def against(
        self,
        quantity: str,
        expected: Tensor,
        ours: Tensor,
        tolerance: float | None,
        *,
        where: Tensor | None = None,
        relative: bool = False,
    ) -> None:
        """Compare ``ours`` with ``expected``; a tolerance of None means exactly."""
        ours = ours.detach().cpu()
        if expected.shape != ours.shape:
            shapes = f"shape {tuple(ours.shape)}, expected {tuple(expected.shape)}"
            self._add(quantity, Status.FAIL, tolerance=tolerance or 0.0, reason=shapes)
            return
        if where is not None:
            expected, ours = expected[where], ours[where]
        if tolerance is None:
            error = float((expected.long() != ours.long()).sum())
        else:
            difference = (expected.double() - ours.double()).abs()
            if relative:
                difference = difference / expected.double().abs().clamp(min=1)
            error = float(difference.max()) if difference.numel() else 0.0
        if not math.isfinite(error):
            self._add(quantity, Status.FAIL, tolerance=tolerance, reason="not finite")
            return
        status = Status.PASS if error <= (tolerance or 0.0) else Status.FAIL
        self._add(quantity, status, error, tolerance or 0.0)

    def fail(self, quantity: str, reason: str) -> None:
        """Record that a quantity could not be compared, but should have been."""
        self._add(quantity, Status.FAIL, reason=reason)

    def defect(self, keys: Iterable[str], reason: str) -> None:
        """Record arrays in which the official code is wrong."""
        for key in keys:
            self._mark(key, Status.DEFECT, reason)

    def finish(self) -> None:
        """Account for every array that was not looked at."""
        if not any(result.status in (Status.PASS, Status.FAIL) for result in self.results):
            self.fail("(all)", "the file holds no array that could be compared")
        for key in self.file.keys:
            if key not in self.file.used and key not in DESCRIPTIONS:
                self._mark(key, Status.NOT_COMPARED, "an array that this check does not know")

    def _mark(self, key: str, status: Status, reason: str) -> None:
        self.file.used.add(key)
        self._add(key, status, reason=reason)

    def _add(
        self,
        quantity: str,
        status: Status,
        error: float | None = None,
        tolerance: float | None = None,
        reason: str = "",
    ) -> None:
        self.results.append(Result(self.file.label, quantity, status, error, tolerance, reason))
