"""Makes the links of the README absolute in the metadata: a package index shows it without the repository."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from hatchling.metadata.plugin.interface import MetadataHookInterface

LINK = re.compile(r"(?P<picture>!?)\[(?P<text>[^\]]*)\]\((?!https?:|#)(?P<path>[^)]+)\)")


class AbsoluteLinks(MetadataHookInterface):
    """Sets ``readme``, which pyproject.toml therefore lists as dynamic."""

    def update(self, metadata: dict[str, Any]) -> None:
        """Add the README, its links led to the repository that ``[project.urls]`` names."""
        text = (Path(self.root) / "README.md").read_text(encoding="utf-8")
        repository = metadata["urls"]["Repository"]

        def absolute(link: re.Match[str]) -> str:
            kind = "raw" if link["picture"] else "blob"
            return f"{link['picture']}[{link['text']}]({repository}/{kind}/main/{link['path']})"

        metadata["readme"] = {"content-type": "text/markdown", "text": LINK.sub(absolute, text)}
