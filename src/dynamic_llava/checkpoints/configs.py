"""Making transformers' configs from what a file says."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub.errors import StrictDataclassError


@contextmanager
def made_from(path: Path | str, kind: str) -> Iterator[None]:
    """Turn whatever transformers raises while it makes a config into one line that names the file.

    Raises
    ------
    ValueError
        If the file holds no config of that kind.
    """
    try:
        yield
    except (StrictDataclassError, OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        reason = " ".join(str(error).split())  # transformers breaks the reason off into a line of its own
        raise ValueError(f"{path} is no config of a {kind}: {reason}") from error
