"""``dynamic-llava methods``: every method there is, with its settings."""

from __future__ import annotations

import json

from tests.command_line import Command

from dynamic_llava import methods


def test_all_methods_are_listed(command: Command) -> None:
    shown = command("methods").stdout
    listed = json.loads(command("methods", "--json").stdout.splitlines()[-1])
    assert listed.keys() == {"image", "output"}
    for kind, found in listed.items():
        assert tuple(found) == methods.names(kind)
        assert all(name in shown for name in found)
    assert listed["output"]["streaming"]["settings"] == {"sinks": 4}
    assert listed["image"]["fastv"]["needs"] == ["attention weights"]
    assert listed["image"]["learned"]["needs"] == ["a trained predictor"]
