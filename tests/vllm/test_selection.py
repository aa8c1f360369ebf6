"""Which tokens enter the upper layers and where they go, against a plain loop."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn

from dynamic_llava.methods.top_k import keep_count
from dynamic_llava.vllm.batch import Batch, Request
from dynamic_llava.vllm.rates import Rates
from dynamic_llava.vllm.selection import Selecting


class FirstChannels(nn.Module):
    """Takes the logits from the hidden states themselves."""

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden[..., :2]


def batch_of(requests: Sequence[Request], done: Sequence[int]) -> Batch:
    return Batch(requests, done, torch.arange(len(requests)).flip(0))


def select(batch: Batch, new: Sequence[int], hidden_NC: Tensor, held: Tensor):
    begin = torch.tensor([0, *new]).cumsum(0).int()
    longest = max(done + fed for done, fed in zip(batch.done, new, strict=True))
    return Selecting(FirstChannels(), FirstChannels())(hidden_NC, batch, begin, begin, longest, held)


def stays(request: Request, done: int, hidden_NC: Tensor) -> list[bool]:
    """Return the decision on each of a row's new tokens, one by one."""
    margin = (hidden_NC[:, 0] - hidden_NC[:, 1]).tolist()
    kept = [True] * len(margin)
    for first, count in request.pictures:
        if done <= first < done + len(margin):
            place = range(first - done, first - done + count)
            best = sorted(place, key=lambda at: -margin[at])[: keep_count(count, request.rates.image)]
            for at in place:
                kept[at] = at in best
    for at in range(max(request.prompt - done, 0), len(margin)):
        kept[at] = margin[at] > request.rates.threshold
    return kept


@pytest.mark.parametrize("seed", range(40))
def test_it_is_what_a_plain_loop_selects(seed: int) -> None:
    rng = random.Random(seed)
    torch.manual_seed(seed)
    requests, done, new = [], [], []
    decode_only = seed % 4 == 0
    for name in range(rng.randint(1, 5)):
        spans, at = [], 0
        for _ in range(rng.randint(0, 2)):
            at += rng.randint(0, 3)
            spans.append((at, rng.choice((4, 6))))
            at += spans[-1][1]
        prompt = at + rng.randint(1, 4)
        rates = Rates(rng.choice((0.3, 0.5, 1.0)), rng.choice((-math.inf, 0.0, 0.5)))
        requests.append(Request(str(name), prompt, spans, rates))
        starts = [0, *(first + count for first, count in spans), prompt, prompt + 3]
        done.append(prompt + rng.randint(0, 3) if decode_only else rng.choice(starts))
        new.append(1 if decode_only else max(prompt - done[-1], 0) + rng.randint(1, 4))
    held = torch.tensor([rng.randint(0, was) for was in reversed(done)], dtype=torch.int32)
    before = held.clone()
    hidden_NC = torch.randn(sum(new), 3)
    batch = batch_of(requests, done)

    selection = select(batch, new, hidden_NC, held)

    index, slots, begin, lengths, holds, at = [], [], [0], [], [], 0
    for row, (request, was, fed) in enumerate(zip(requests, done, new, strict=True)):
        kept = stays(request, was, hidden_NC[at : at + fed])
        enters = [keep or token == fed - 1 for token, keep in enumerate(kept)]
        first = int(before[len(requests) - 1 - row]) if was else 0
        index += [at + token for token, enter in enumerate(enters) if enter]
        slots += range(first, first + sum(enters))
        begin.append(begin[-1] + sum(enters))
        lengths.append(first + sum(enters))
        holds.append(first + sum(kept))
        at += fed
    assert selection.index_M.tolist() == index
    assert selection.slot_M.tolist() == slots
    assert selection.begin_S.tolist() == selection.begin.tolist() == begin
    assert selection.length_R.tolist() == lengths
    assert selection.held_R.tolist() == holds == held.flip(0).tolist()
    assert selection.longest >= max(lengths)
    assert selection.longest_row >= max(torch.tensor(begin).diff().tolist())
    row_M = torch.repeat_interleave(torch.tensor(begin).diff())
    assert selection.row_M.tolist() == row_M.tolist()


def test_padding_never_enters() -> None:
    batch = batch_of([Request("a", 3, [], Rates(1.0, -math.inf))], [0])
    assert select(batch, [3], torch.randn(5, 3), torch.zeros(1, dtype=torch.int32)).index_M.tolist() == [
        0,
        1,
        2,
    ]


def test_a_split_picture_is_an_error() -> None:
    batch = batch_of([Request("a", 9, [(1, 6)], Rates(0.5, 0.0))], [0])
    with pytest.raises(RuntimeError, match="split"):
        select(batch, [4], torch.randn(4, 3), torch.zeros(1, dtype=torch.int32))
