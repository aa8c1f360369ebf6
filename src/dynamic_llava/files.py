"""Writes files so that no reader ever meets half of one; tells in a line why one cannot be read."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary name beside ``path`` to write to; rename it to ``path`` once the block has succeeded.

    Missing folders are made. If the block raises, the temporary file is removed and ``path`` stays as it was.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.stem}.partial{path.suffix}")  # the suffix stays: writers choose by it
    try:
        yield partial
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def first_line(error: Exception) -> str:
    """Return an error's message without the advice that follows it."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write ``content`` as indented JSON with a final newline."""
    with replacing(path) as partial:
        partial.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
