"""The hub of models: which names can be ids there, and fetching what one names."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from dynamic_llava.files import first_line


def is_id(name: str | Path) -> bool:
    """Tell whether ``name`` may be an id (``owner/name``); a ``Path`` or a name like ``./x`` is a folder."""
    return not isinstance(name, Path) and name.count("/") == 1 and name[0] not in "./~"


@dataclass(frozen=True)
class Access:
    """How what a hub id names is reached.

    Attributes
    ----------
    revision
        Branch, tag or commit of that repository; None means its main branch.
    token
        Of the hub; None means the one that this machine is logged in with.
    cache_dir
        Folder that files are fetched into; None means the hub's own cache.
    """

    revision: str | None = None
    token: str | bool | None = None
    cache_dir: str | Path | None = None

    def elsewhere(self) -> Access:
        """Return the same for another repository, which does not have that revision."""
        return replace(self, revision=None)


DEFAULT = Access()


def fetch(hub_id: str, files: Sequence[str], kind: str, access: Access = DEFAULT) -> Path:
    """Return the local folder of what ``hub_id`` names, fetched where it is not there yet.

    Parameters
    ----------
    hub_id
        Such as ``owner/name``.
    files
        Patterns of the files to fetch.
    kind
        What it should be, for the message.
    access
        Revision, token and cache.

    Raises
    ------
    FileNotFoundError
        If there is no such repository or revision, or no connection to the hub.
    """
    try:
        return Path(
            snapshot_download(
                hub_id,
                allow_patterns=list(files),
                revision=access.revision,
                token=access.token,
                cache_dir=access.cache_dir,
            )
        )
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise FileNotFoundError(
            f"{hub_id}: neither a folder nor a {kind} that could be fetched ({first_line(error)})"
        ) from error
