"""Fits docstrings to the site: Markdown knows no roles of Sphinx, and a default is looked up by one name."""

from __future__ import annotations

import re
from typing import Any

from griffe import Extension, Object

ROLE = re.compile(r":(?:attr|class|data|func|meth|mod):`~?([^`]+)`")
SHARED = re.compile(r"^(?P<names>\w+(?:, \w+)+)(?P<kind> :.*)?\n(?P<text>(?: {4}.*(?:\n|$))+)", re.MULTILINE)


class Fitted(Extension):
    """An extension of griffe, which reads the sources for mkdocstrings."""

    def on_object(self, *, obj: Object, **kwargs: Any) -> None:
        """Rewrite the docstring of one module, class, function or attribute."""
        if obj.docstring is not None:
            obj.docstring.value = SHARED.sub(_parted, ROLE.sub(r"`\1`", obj.docstring.value))


def _parted(entry: re.Match[str]) -> str:
    """Return an entry of its own for each of the parameters that share one."""
    text = entry["text"].rstrip("\n")
    return "".join(f"{name}{entry['kind'] or ''}\n{text}\n" for name in entry["names"].split(", "))
