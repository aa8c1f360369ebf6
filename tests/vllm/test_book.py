"""How many slots the scheduler thinks a request needs: never too few, and exactly once it was told."""

from __future__ import annotations

import random

import pytest

from dynamic_llava.vllm.book import Book, Entry, Told


def test_a_text_needs_a_slot_a_token() -> None:
    entry = Entry.of([], 0.2)
    assert [entry.slots(tokens) for tokens in range(4)] == [0, 1, 2, 3]


def test_a_picture_gives_its_dropped_tokens_back_when_it_has_ended() -> None:
    entry = Entry.of([(2, 10)], 0.2)
    assert entry.slots(2) == 2
    assert entry.slots(12) == 4 + 1  # the last token of a chunk takes part even if it is dropped
    assert entry.slots(13) == 5
    assert Entry.of([(2, 10)], 1.0).slots(12) == 12


def test_what_the_workers_told_replaces_what_was_thought() -> None:
    entry = Entry.of([(2, 10), (12, 10)], 0.2)
    entry.told = Told(tokens=12, held=4)
    assert entry.slots(14) == 6
    assert entry.slots(23) == 4 + 11 - 8
    assert entry.slots(11) == 11  # told too late: the request began anew


@pytest.mark.parametrize("seed", range(50))
def test_it_is_never_too_few(seed: int) -> None:
    """Run a request in random chunks with random decisions, told late or never, and preempted."""
    rng = random.Random(seed)
    spans, tokens = [], 0
    for _ in range(rng.randint(0, 3)):
        tokens += rng.randint(0, 5)
        count = rng.randint(1, 12)
        spans.append((tokens, count))
        tokens += count
    prompt, rate = tokens + rng.randint(1, 5), rng.choice((0.2, 0.6, 1.0))
    book = Book()
    book.open("a", Entry.of(spans, rate))
    entry = Entry.of(spans, rate)
    ends = {first + count for first, count in spans}
    done = held = 0
    while done < prompt + 20:
        new = rng.randint(1, 8) if done < prompt else 1
        for first, count in spans:
            if first < done + new < first + count:
                new = first - done if first > done else count
        # Of the chunk's tokens all stay but those of pictures that end in it, and perhaps output tokens.
        dropped = sum(drops for end, drops in entry.drops if done < end <= done + new)
        stay = new - dropped - (done >= prompt and rng.random() < 0.5)
        is_last_dropped = (done + new in ends and rate < 1) or stay < new - dropped
        assert book.slots("a", done + new) >= held + stay + is_last_dropped
        done, held = done + new, held + stay
        if rng.random() < 0.5:
            book.tell("a", Told(done, held))
        if rng.random() < 0.05:
            book.forget("a")
            done = held = 0
    book.close("a")
    book.tell("a", Told(1, 1))
    assert len(book) == 0
