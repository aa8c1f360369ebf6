"""``dynamic-llava methods``: what may drop image tokens and output tokens."""

from __future__ import annotations

from typing import Any

from dynamic_llava.cli.options import Json
from dynamic_llava.cli.output import print_json


def command(as_json: Json = False) -> None:
    """List the methods that choose which tokens to keep, with their settings.

    Example: dynamic-llava methods
    """
    from rich.console import Console
    from rich.table import Table

    listed = {kind: _listed(kind) for kind in ("image", "output")}
    if as_json:
        print_json(listed)
        return
    console = Console()
    for kind, option in (("image", "--image-policy"), ("output", "--text-policy")):
        table = Table(option, f"what drops {kind} tokens", "settings", "needs")
        for name, facts in listed[kind].items():
            settings = ", ".join(f"{key}={value}" for key, value in facts["settings"].items())
            table.add_row(name, facts["summary"], settings, ", ".join(facts["needs"]))
        console.print(table)


def _listed(kind: str) -> dict[str, dict[str, Any]]:
    from dynamic_llava import methods

    return {
        name: {
            "summary": methods.summary_of(method),
            "settings": methods.settings_of(method),
            "needs": list(method.needs()),
        }
        for name in methods.names(kind)
        for method in [methods.find(kind, name)]
    }
