"""Caches whose size is known: planned ones that grow where the plan falls short, static ones that compile."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests import tiny
from torch import Tensor
from transformers import CompileConfig, StaticCache

from dynamic_llava.core.cache import context_of

STEPS = 40


@pytest.fixture
def rows() -> list[dict[str, Tensor]]:
    return [tiny.row(4, 1, 0), tiny.row(9, 1, 1), tiny.row(6, 1, 2)]


def attached(**settings: Any) -> Any:
    model = tiny.model()
    tiny.sparsifier(**settings).attach(model)
    return model


def generate(model: Any, inputs: dict[str, Tensor], **settings: Any) -> Tensor:
    return model.generate(**inputs, max_new_tokens=STEPS, do_sample=False, **settings)


def needed(inputs: dict[str, Tensor]) -> int:
    return inputs["input_ids"].shape[1] + STEPS - 1


@pytest.mark.parametrize("rate", [0.05, 0.5, 1.0])
@pytest.mark.parametrize("static", [False, True])
def test_known_size_equals_a_growing_cache(rows: list[dict[str, Tensor]], static: bool, rate: float) -> None:
    model, inputs = attached(text_keep_rate=rate), tiny.batch(rows)
    expected = generate(model, inputs)
    kept = model.sparsifier.report.text_kept
    cache = model.sparsifier.new_cache(capacity=needed(inputs), static=static)
    assert torch.equal(generate(model, inputs, past_key_values=cache), expected)
    assert all(torch.equal(a, b) for a, b in zip(context_of(cache).report.text_kept, kept, strict=True))
    with pytest.raises((ValueError, RuntimeError, IndexError), match=r"cache is full|out of bounds"):
        generate(model, inputs, past_key_values=model.sparsifier.new_cache(needed(inputs) - 1, static))


def test_sparse_layers_reserve_what_is_expected_to_stay(rows: list[dict[str, Tensor]]) -> None:
    model, inputs = attached(text_policy="uniform", text_keep_rate=0.5), tiny.batch(rows)
    capacity = needed(inputs)
    cache = model.sparsifier.new_cache(capacity)
    generate(model, inputs, past_key_values=cache)
    entering = inputs["input_ids"].shape[1] - 12
    sizes = [layer.keys.shape[2] for layer in cache.layers]
    assert sizes == [capacity, capacity] + [entering + (STEPS - 1 + 1) // 2 + 1] * 2

    longer = model.sparsifier.new_cache(capacity + 200)
    generate(model, inputs, past_key_values=longer)
    assert longer.layers[0].keys.shape[2] == capacity + 200


def test_a_plan_that_falls_short_grows_in_small_steps(rows: list[dict[str, Tensor]]) -> None:
    model, inputs = attached(text_keep_rate=0.05), tiny.batch(rows)
    cache = model.sparsifier.new_cache(needed(inputs))
    generate(model, inputs, past_key_values=cache)
    longest = int(context_of(cache).slots.length_B.max())
    planned = inputs["input_ids"].shape[1] - 12 + 3
    assert longest > planned + 1, "the test must need more than was planned"
    assert planned < cache.layers[-1].keys.shape[2] <= longest + 17


def test_generate_with_a_static_cache(rows: list[dict[str, Tensor]]) -> None:
    """``generate`` makes 4-D masks for it, of which padding must be told."""
    for inputs in (tiny.batch(rows), rows[0]):
        for attention in ("sdpa", "eager"):
            model = tiny.model(attention)
            tiny.sparsifier().attach(model)
            expected = generate(model, inputs)
            assert torch.equal(generate(model, inputs, cache_implementation="static"), expected)


def test_a_second_turn_with_a_static_cache(rows: list[dict[str, Tensor]]) -> None:
    model, inputs = attached(), tiny.batch(rows)
    turn = torch.randint(10, 40, (3, 5), generator=torch.Generator().manual_seed(1))
    answers = []
    for cache in (None, model.sparsifier.new_cache(200, static=True)):
        first = generate(model, inputs, past_key_values=cache, return_dict_in_generate=True)
        ids = torch.cat([first.sequences, turn], dim=1)
        mask = torch.nn.functional.pad(inputs["attention_mask"], (0, STEPS + 5), value=1)
        answers.append(
            model.generate(
                input_ids=ids,
                attention_mask=mask,
                past_key_values=first.past_key_values,
                max_new_tokens=9,
                do_sample=False,
            )
        )
    assert torch.equal(*answers)


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("policy", ["learned", "uniform", "random"])
def test_decode_step_compiles_as_one_graph(rows: list[dict[str, Tensor]], policy: str) -> None:
    """No graph break and no new graph after the first: what it is lowered to is torch's matter."""
    torch.compiler.reset()
    model, inputs = attached(text_policy=policy), tiny.batch(rows)
    tokens = torch.randint(10, 40, (12, 3, 1), generator=torch.Generator().manual_seed(2))
    step = torch.compile(model, backend="eager", fullgraph=True)
    logits = []
    for run in (model, step):
        past = model(**inputs, past_key_values=model.sparsifier.new_cache(60, static=True)).past_key_values
        for number, token in enumerate(tokens):
            stance = "fail_on_recompile" if run is step and number > 1 else "default"
            with torch.compiler.set_stance(stance):
                out = run(input_ids=token, past_key_values=past)
            logits.append(out.logits)
    expected, compiled = torch.cat(logits).split(3 * len(tokens))
    torch.testing.assert_close(compiled, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.slow
@torch.no_grad()
def test_a_static_cache_may_be_begun_in_a_compiled_call(rows: list[dict[str, Tensor]]) -> None:
    torch.compiler.reset()
    model, row = attached(), rows[0]
    expected = model(**row).logits
    cache = model.sparsifier.new_cache(60, static=True)
    found = torch.compile(model, backend="eager")(**row, past_key_values=cache).logits
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.slow
def test_generate_compiles_the_steps_of_a_static_cache(rows: list[dict[str, Tensor]]) -> None:
    torch.compiler.reset()
    model, inputs = attached(), tiny.batch(rows)
    expected = generate(model, inputs)
    compiling = CompileConfig(fullgraph=True, backend="eager", mode=None)
    compiling._compile_all_devices = True
    found = generate(model, inputs, cache_implementation="static", compile_config=compiling)
    assert torch.equal(found, expected)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0


def test_a_static_cache_that_is_filled_is_refused(rows: list[dict[str, Tensor]]) -> None:
    model = attached()
    filled = StaticCache(config=model.config.text_config, max_cache_len=64)
    model.sparsifier.detach()
    model(**rows[0], past_key_values=filled)
    tiny.sparsifier().attach(model)
    with pytest.raises(ValueError, match="past_key_values is a StaticCache"):
        model(**rows[0], past_key_values=filled)
    with pytest.raises(ValueError, match="needs its capacity"):
        model.sparsifier.new_cache(static=True)
    for capacity in (0, 40.5, "50", True):
        with pytest.raises(ValueError, match="whole number"):
            model.sparsifier.new_cache(capacity)
