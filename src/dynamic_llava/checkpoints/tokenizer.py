"""Whether a checkpoint folder has a tokenizer, and whether it can be read here."""

from __future__ import annotations

from pathlib import Path

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model")


def has_tokenizer(folder: Path) -> bool:
    """Tell whether a checkpoint folder has a tokenizer."""
    return any((folder / name).is_file() for name in TOKENIZER_FILES)
