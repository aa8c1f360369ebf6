"""Conformance with golden vectors: numbers of the official code, computed again by this library.

:func:`verify` runs every file of a folder; each kind of file has one module here, which drives the library's
public interface and looks inside by forward hooks (:class:`Probe`).
"""

from __future__ import annotations

from dynamic_llava.verification.comparison import Comparison, Result, Status
from dynamic_llava.verification.files import GoldenFile, find
from dynamic_llava.verification.run import verify
from dynamic_llava.verification.tables import as_json, table

__all__ = ["Comparison", "GoldenFile", "Result", "Status", "as_json", "find", "table", "verify"]
