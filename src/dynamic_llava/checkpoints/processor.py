"""The processor of a checkpoint in transformers' format."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import AutoProcessor, ProcessorMixin

from dynamic_llava.files import first_line


def read_processor(folder: Path, config: Any) -> ProcessorMixin:
    """Read the processor of a model with ``config``.

    Raises
    ------
    ValueError
        If it cannot be read.
    """
    try:
        processor: ProcessorMixin = AutoProcessor.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise ValueError(f"{folder}: the processor cannot be read: {first_line(error)}") from error
    return processor
