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
    kept.note(batch, torch.tensor(starts), torch.tensor(padded, dtype=torch.bool))


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


def test_long_answers_find_room() -> None:
    kept, flags = Kept(), [place % 3 > 0 for place in range(5000)]
    for start in range(0, 5000, 700):
        note(kept, [(request("a"), start, [int(flag) for flag in flags[start : start + 700]])])
    told = kept.tell("a", BYTES)
    assert told is not None
    assert told["output_kept"] == flags[6:]


def test_the_oldest_is_forgotten_and_stays_unknown() -> None:
    kept = Kept(remembered=2)
    for name in "abcd":
        note(kept, [(request(name), 0, [1] * 6)])
    for name in "abcd":  # all of them still run
        note(kept, [(request(name), 6, [1])])
    assert [name for name in "abcd" if kept.tell(name, BYTES)] == ["c", "d"]


def test_chats_and_completions_are_found_by_the_id_of_their_client() -> None:
    kept = Kept()
    for name in ("chatcmpl-1-0a1b2c3d", "cmpl-2-0-0a1b2c3d", "chatcmpl-3", "cmpl-4-1-0a1b2c3d"):
        note(kept, [(request(name), 0, [1] * 6)])
    found = [
        name
        for name in ("chatcmpl-1", "cmpl-2", "chatcmpl-3", "cmpl-4", "chatcmpl", "")
        if kept.tell(name, BYTES)
    ]
    assert found == ["chatcmpl-1", "cmpl-2", "chatcmpl-3"]


def test_a_name_that_comes_again_without_asking_leaves_the_notes_alone() -> None:
    kept = Kept()
    note(kept, [(request("a"), 0, [1] * 6)])
    note(kept, [(request("a", explains=False), 0, [0, 0])])
    told = kept.tell("a", BYTES)
    assert told is not None
    assert told["image_tokens_kept"] == 4


def test_a_name_that_comes_again_is_another_request() -> None:
    kept = Kept()
    note(kept, [(request("a"), 0, [1] * 6)])
    again = Request("a", prompt=3, pictures=[], rates=RATES, explains=True)
    note(kept, [(again, 0, [1, 1, 1])])
    told = kept.tell("a", BYTES)
    assert told is not None
    assert told["pictures"] == []
