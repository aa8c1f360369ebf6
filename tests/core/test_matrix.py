"""The matrix of equivalences: mode x attention x dtype x policy x batch shape, each against its rows alone.

Answers are given, not generated, so that every cell of the matrix compares the same thing: the logits of
each answer token, in rows that are run one by one with a cache, and in the batch as the mode runs it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests import tiny
from torch import Tensor

Rows = list[dict[str, Tensor]]
STEPS = 10
SHAPES = {  # text tokens and pictures of each row
    "one row": [(9, 1)],
    "ragged": [(3, 1), (17, 1), (9, 1)],
    "pictures 0, 1, 2": [(6, 0), (4, 1), (11, 2)],
}
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.25, torch.float16: 0.03}


def positions(mask_BN: Tensor) -> Tensor:
    return (mask_BN.cumsum(-1) - 1).clamp(min=0)


def cached(model: Any, inputs: dict[str, Tensor], answers_BT: Tensor, cache: Any = None) -> Tensor:
    """One call for the prompt, then one for each token."""
    mask = inputs["attention_mask"]
    out = model(**inputs, position_ids=positions(mask), past_key_values=cache, use_cache=True)
    logits = [out.logits[:, -1]]
    for token_B in answers_BT.T:
        mask = torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1)
        out = model(
            input_ids=token_B[:, None],
            attention_mask=mask,
            position_ids=positions(mask)[:, -1:],
            past_key_values=out.past_key_values,
        )
        logits.append(out.logits[:, -1])
    return torch.stack(logits, dim=1)


def fixed_capacity(model: Any, inputs: dict[str, Tensor], answers_BT: Tensor) -> Tensor:
    """Storage of the exact size, allocated at the first call."""
    capacity = inputs["input_ids"].shape[1] + STEPS
    return cached(model, inputs, answers_BT, model.sparsifier.new_cache(capacity))


def no_cache(model: Any, inputs: dict[str, Tensor], answers_BT: Tensor) -> Tensor:
    """The whole sequence at every step."""
    state, logits = None, []
    for count in range(STEPS + 1):
        longer = with_answers(inputs, answers_BT[:, :count])
        out = model(
            **longer, position_ids=positions(longer["attention_mask"]), past_key_values=state, use_cache=False
        )
        state = out.past_key_values
        logits.append(out.logits[:, -1])
    return torch.stack(logits, dim=1)


def masked(model: Any, inputs: dict[str, Tensor], answers_BT: Tensor) -> Tensor:
    """One pass at full length, in which dropped keys are hidden."""
    longer = with_answers(inputs, answers_BT)
    answer_mask = torch.zeros_like(longer["input_ids"], dtype=torch.bool)
    answer_mask[:, -STEPS:] = True
    out = model(**longer, position_ids=positions(longer["attention_mask"]), answer_mask=answer_mask)
    return out.logits[:, -STEPS - 1 :]


def with_answers(inputs: dict[str, Tensor], answers_BT: Tensor) -> dict[str, Tensor]:
    return inputs | {
        "input_ids": torch.cat([inputs["input_ids"], answers_BT], dim=1),
        "attention_mask": torch.cat([inputs["attention_mask"], torch.ones_like(answers_BT)], dim=1),
    }


MODES: dict[str, Callable[..., Tensor]] = {
    "cached": cached,
    "fixed capacity": fixed_capacity,
    "no cache": no_cache,
    "masked": masked,
}


@torch.no_grad()
def worst(model: Any, rows: Rows, mode: Callable[..., Tensor], seed: int = 0) -> float:
    """Largest difference of a batch's logits from those of its rows alone."""
    dtype = model.dtype
    rows = [{k: v.to(dtype) if v.is_floating_point() else v for k, v in row.items()} for row in rows]
    generator = torch.Generator().manual_seed(seed)
    answers_BT = torch.randint(4, tiny.VOCABULARY, (len(rows), STEPS), generator=generator)
    together = mode(model, tiny.batch(rows), answers_BT)
    alone = [cached(model, row, answers_BT[i : i + 1]) for i, row in enumerate(rows)]
    return (together - torch.cat(alone)).abs().max().item()


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("policy", ["learned", "random", "uniform"])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("attention", ["sdpa", "eager", "flex_attention"])
@pytest.mark.parametrize("mode", MODES.values(), ids=MODES)
def test_batch_equals_its_rows_alone(
    mode: Callable[..., Tensor],
    attention: str,
    dtype: torch.dtype,
    policy: str,
    shape: list[tuple[int, int]],
) -> None:
    if policy == "learned" and dtype != torch.float32:
        pytest.skip("a learned decision may turn on rounding; the fixed policies show the rest in this dtype")
    model = tiny.model(attention).to(dtype)
    tiny.sparsifier(**tiny.policies(policy)).attach(model)
    rows = [tiny.row(text, images, seed) for seed, (text, images) in enumerate(shape)]
    with torch.compiler.set_stance("force_eager"):  # flex attention compiles itself otherwise, for minutes
        assert worst(model, rows, mode) < TOLERANCE[dtype]


ROWS = st.lists(st.tuples(st.integers(1, 40), st.integers(0, 3)), min_size=1, max_size=6)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(ROWS, st.sampled_from(list(MODES.values())), st.booleans(), st.floats(0.05, 1.0), st.integers(0, 999))
def test_any_shape_and_any_decisions(
    shape: list[tuple[int, int]], mode: Callable[..., Tensor], grouped: bool, rate: float, seed: int
) -> None:
    model = tiny.model(seed=seed, key_heads=2 if grouped else 4)
    tiny.sparsifier(seed, image_keep_rate=rate).attach(model)
    rows = [tiny.row(text, images, seed + number) for number, (text, images) in enumerate(shape)]
    assert worst(model, rows, mode, seed) < 2e-4
