"""The programs that compare two commits: what they count and how they judge."""

from __future__ import annotations

import pytest

from evidence import code_lines, overhead, remeasure, revisions

SOURCE = '''"""A module.

Its docstring.
"""

import math  # why


class Thing:
    """One line."""

    size = 3
    """Beside an attribute."""

    def area(
        self,
    ) -> float:
        # a comment
        return (
            math.pi * self.size  # another
        )
'''


def test_docstrings_comments_and_blanks_are_no_code() -> None:
    assert code_lines.code_lines(SOURCE) == 9


def test_modules_that_ran_are_counted() -> None:
    lines = code_lines.count("")
    assert {"core/hooks.py", "core/cache.py", "config.py"} <= lines.keys()
    assert not {"sparsifier.py", "core/eviction.py", "core/sampled.py", "adapter.py"} & lines.keys()


def test_ratios_are_judged_by_the_upper_end_of_their_interval() -> None:
    rounds = [{"pairs": [(1.0, ratio), (2.0, 2 * ratio)], "same": True} for ratio in (0.99, 1.0, 1.01, 1.0)]
    found = overhead.compare("random: prefill", rounds)
    low, high = found["interval_95"]
    assert (found["ratio"], found["reached"]) == (1.0, True)
    assert 0.99 <= low <= 1.0 <= high <= 1.01
    slower = [{"pairs": [(1.0, 1.04)], "same": True}] * 4
    assert not overhead.compare("random: prefill", slower)["reached"]
    assert overhead.compare("nano: prefill", slower)["reached"]


@pytest.mark.parametrize(
    ("kind", "changed", "far"),
    [
        ("perplexity", {"value": 1.25}, 0.25),
        ("perplexity", {"output_tokens_kept": 0.4}, float("inf")),
        ("accuracy", {"value": 1.25}, float("inf")),
        ("accuracy", {}, 0.0),
    ],
)
def test_only_a_perplexity_may_move(kind: str, changed: dict[str, float], far: float) -> None:
    row = {"kind": kind, "value": 1.0, "total": 60, "image_tokens_kept": 0.2, "output_tokens_kept": 0.5}
    assert remeasure.difference(row, row | changed) == far


def test_an_unknown_commit_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exited, revisions.checked_out("nothing"):
        pass
    assert exited.value.code == 2
    assert "error: cannot read commit 'nothing'" in capsys.readouterr().err
