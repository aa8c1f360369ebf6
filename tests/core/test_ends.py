"""Rows of a batch end at their end token: a report of a batch is the sum of the reports of its rows."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests import tiny

from dynamic_llava import Sparsifier, methods
from dynamic_llava.core.ends import Ends
from dynamic_llava.methods import EvictingMethod

CASES = 200
ENDS = list(range(4, 14))  # of 64 ids: rows end at different lengths
MODES: dict[str, dict[str, Any]] = {
    "cache": {},
    "no cache": {"use_cache": False},
    "static": {"cache_implementation": "static", "disable_compile": True},
}
EVICTING = [
    name for name in methods.names("output") if issubclass(methods.find("output", name), EvictingMethod)
]


def summary(model: Any, inputs: dict[str, torch.Tensor], **settings: Any) -> dict[str, float]:
    model.generate(**inputs, max_new_tokens=12, do_sample=False, **settings)
    found = model.sparsifier.report.summary()
    return {name: number for name, number in found.items() if "seconds" not in name}


def ending_model(policy: str, seed: int) -> tuple[Any, Sparsifier]:
    model = tiny.model()
    model.generation_config.eos_token_id = ENDS
    model.generation_config.pad_token_id = (tiny.PAD, ENDS[0])[seed % 2]  # many models pad with an end token
    made = tiny.sparsifier(text_policy=policy, sparsify_prompt=policy == "learned" and seed % 3 == 0)
    return model, made.attach(model)


@torch.no_grad()
@pytest.mark.parametrize("policy", ["learned", "random", *EVICTING])
@pytest.mark.parametrize("mode", MODES)
def test_a_batch_is_the_sum_of_its_rows(mode: str, policy: str) -> None:
    if policy in EVICTING and mode != "cache":
        pytest.skip("it gives up earlier tokens, which needs a growing cache")
    ended = set()
    for seed in range(CASES // 10):
        model, made = ending_model(policy, seed)
        draw = torch.Generator().manual_seed(seed)
        shapes = torch.randint(0, 9, (2 + seed % 3,), generator=draw).tolist()
        rows = [
            tiny.row(text, (seed + number) % 3, 100 * seed + number) for number, text in enumerate(shapes)
        ]
        alone, lengths, kept = [], [], []
        for row in rows:
            alone.append(summary(model, row, **MODES[mode]))
            lengths.append(len(made.report.text_kept[0]))
            kept.append(made.report.text_kept[0])
        together = summary(model, tiny.batch(rows), **MODES[mode])
        expected = {name: sum(numbers[name] for numbers in alone) for name in alone[0]}
        assert together == pytest.approx(expected), (seed, lengths)
        assert all(torch.equal(a, b) for a, b in zip(made.report.text_kept, kept, strict=True))
        ended |= set(lengths)
    assert len(ended) > 4


@torch.no_grad()
def test_a_second_turn_after_an_early_end_counts_its_rows_alone() -> None:
    model, made = ending_model("random", 0)
    rows, caches = [tiny.row(5, 1, 1), tiny.row(7, 1, 2)], []
    more = torch.randint(14, 60, (1, 4), generator=torch.Generator().manual_seed(1))
    expected: dict[str, float] = {}
    for row in rows:
        cache = made.new_cache()
        first = model.generate(**row, max_new_tokens=12, do_sample=False, past_key_values=cache)
        asked = torch.cat([first, more], dim=1)
        numbers = summary(model, {"input_ids": asked}, past_key_values=cache)
        caches.append(first.shape[1] - row["input_ids"].shape[1])
        for name, number in numbers.items():
            expected[name] = expected.get(name, 0) + number
    assert caches[0] != caches[1]
    batch, cache = tiny.batch(rows), made.new_cache()
    first = model.generate(**batch, max_new_tokens=12, do_sample=False, past_key_values=cache)
    fed = first.shape[1] - batch["input_ids"].shape[1]
    mask = torch.nn.functional.pad(batch["attention_mask"], (0, fed), value=1)
    for row, length in enumerate(caches):
        mask[row, batch["input_ids"].shape[1] + length :] = 0  # as a chat hides what follows the end
    asked = torch.cat([first, more.expand(2, -1)], dim=1)
    mask = torch.nn.functional.pad(mask, (0, 4), value=1)
    together = summary(model, {"input_ids": asked, "attention_mask": mask}, past_key_values=cache)
    for name in ("output_tokens", "output_tokens_kept", "image_tokens", "image_tokens_kept"):
        assert together[name] == expected[name], name


@pytest.mark.parametrize(
    ("ids", "expected"),
    [
        ([[5, 6, 7], [5, 2, 0]], [3, 1]),  # an end token, then padding
        ([[5, 6, 7], [5, 6, 2]], [3, 2]),  # the end token was fed while the other row went on
        ([[5, 6, 7], [5, 6, 0]], [3, 1]),  # stopped by something else: its last token would not be fed
        ([[5, 6, 7], [0, 0, 0]], [3, 0]),
        ([[5, 2, 7], [5, 6, 7]], [3, 3]),  # an end token that more follows was none
        ([[5, 2, 0]], [3]),  # a row alone is fed no padding
    ],
)
def test_where_rows_end(ids: list[list[int]], expected: list[int]) -> None:
    assert Ends((2,), 0).lengths(torch.tensor(ids)).tolist() == expected


def test_rows_end_where_an_end_token_pads() -> None:
    ids = torch.tensor([[5, 6, 7, 8], [5, 2, 2, 2], [5, 3, 2, 2]])
    assert Ends((2, 3), 2).lengths(ids).tolist() == [4, 1, 1]
    assert Ends().lengths(ids).tolist() == [4, 4, 4]
