"""What is remembered of requests that ask to be told which tokens were kept."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from dynamic_llava.vllm.batch import Batch, Request
from dynamic_llava.vllm.kept import Kept
from dynamic_llava.vllm.rates import Rates

RATES = Rates(0.5, 0.0)
BYTES = (10, 100)


def request(name: str, explains: bool = True) -> Request:
    return Request(name, prompt=6, pictures=[(1, 4)], rates=RATES, explains=explains)


def note(kept: Kept, rows: Sequence[tuple[Request, int, Sequence[int]]]) -> None:
    """Note a pass of rows: a request, its tokens of earlier passes, and flags of its new ones."""
    starts = [0]
    for _, _, flags in rows:
        starts.append(starts[-1] + len(flags))
    padded = [flag for _, _, flags in rows for flag in flags] + [1, 1]
    batch = Batch([row[0] for row in rows], [row[1] for row in rows], torch.arange(len(rows)))
    kept.note(batch, starts, torch.tensor(padded, dtype=torch.bool))


def test_passes_add_up_and_other_requests_are_not_noted() -> None:
    kept = Kept()
    note(kept, [(request("a-12345678"), 0, [1, 1, 0, 0, 1, 1]), (request("b", explains=False), 0, [1] * 6)])
    note(kept, [(request("a-12345678"), 6, [0])])
    note(kept, [(request("b", explains=False), 6, [0]), (request("a-12345678"), 7, [1])])
    told = kept.tell("a", BYTES)
    assert told == {
        "image_tokens": 4, "image_tokens_kept": 2, "output_tokens": 2, "output_tokens_kept": 1,
        "kv_bytes": 8 * 10 + 5 * 100, "kv_bytes_dense": 8 * 110,
        "pictures": [{"tokens": 4, "side": 2, "kept": [0, 3]}], "output_kept": [False, True],
    }  # fmt: skip
    assert kept.tell("b", BYTES) is None
    assert kept.tell("", BYTES) is None


def test_what_is_computed_anew_replaces_what_was() -> None:
    kept = Kept()
    note(kept, [(request("a"), 0, [1] * 6)])
    note(kept, [(request("a"), 6, [0])])
    note(kept, [(request("a"), 0, [1, 0, 0, 1])])  # after a preemption, in two chunks
    note(kept, [(request("a"), 4, [1, 1, 1])])
    told = kept.tell("a", BYTES)
    assert told is not None
    assert (told["output_kept"], told["pictures"][0]["kept"]) == ([True], [2, 3])


def test_the_oldest_is_forgotten() -> None:
    kept = Kept(remembered=2)
    for name in "abc":
        note(kept, [(request(name), 0, [1] * 6)])
    note(kept, [(request("b"), 6, [1])])
    note(kept, [(request("d"), 0, [1] * 6)])
    assert [name for name in "abcd" if kept.tell(name, BYTES)] == ["b", "d"]
