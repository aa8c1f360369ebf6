"""The hub of models: which names can be ids there, and fetching what one names."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from dynamic_llava.files import first_line


def is_id(name: str | Path) -> bool:
    """Tell whether ``name`` may be an id (``owner/name``); a ``Path`` or a name like ``./x`` is a folder."""
    return not isinstance(name, Path) and name.count("/") == 1 and name[0] not in "./~"


def fetch(hub_id: str, files: Sequence[str], kind: str) -> Path:
    """Return the local folder of what ``hub_id`` names, fetched where it is not there yet.

    Parameters
    ----------
    hub_id
        Such as ``owner/name``.
    files
        Patterns of the files to fetch.
    kind
        What it should be, for the message.

    Raises
    ------
    FileNotFoundError
        If there is no such repository, or no connection to the hub.
    """
    try:
        return Path(snapshot_download(hub_id, allow_patterns=list(files)))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise FileNotFoundError(
            f"{hub_id}: neither a folder nor a {kind} that could be fetched ({first_line(error)})"
        ) from error
