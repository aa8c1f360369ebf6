"""One matrix of equivalences: whatever way an answer is computed, it is the same answer."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests import tiny
from torch import Tensor
from transformers import DynamicCache

from dynamic_llava import methods

CLOSE = {"atol": 1e-5, "rtol": 1e-4}
STEPS = 64
COUNTS = st.lists(st.tuples(st.integers(1, 24), st.integers(0, 2)), min_size=2, max_size=5)


def generate(model: Any, inputs: dict[str, Tensor], steps: int = STEPS, **options: Any) -> Tensor:
    out = model.generate(**inputs, max_new_tokens=steps, min_new_tokens=steps, do_sample=False, **options)
    return out[:, -steps:]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("policy", methods.names("image"))
def test_ragged_batch_equals_each_row_alone(attention: str, policy: str) -> None:
    model, sparsifier = tiny.model(attention), tiny.sparsifier(**tiny.policies(policy))
    sparsifier.attach(model)
    rows = [
        tiny.row(text, images, seed) for seed, (text, images) in enumerate([(3, 1), (17, 1), (9, 2), (6, 0)])
    ]
    together = generate(model, tiny.batch(rows))
    batch_report = sparsifier.report
    for number, row in enumerate(rows):
        assert torch.equal(generate(model, row)[0], together[number])
        assert torch.equal(sparsifier.report.text_kept[0], batch_report.text_kept[number])
        assert torch.equal(sparsifier.report.image_kept[0], batch_report.image_kept[number])
        assert torch.equal(sparsifier.report.kv_lengths[:, 0], batch_report.kv_lengths[:, number])


@pytest.mark.slow
@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(COUNTS, st.integers(0, 1000))
def test_ragged_batches_of_any_shape(counts: list[tuple[int, int]], seed: int) -> None:
    model = tiny.model()
    tiny.sparsifier(seed).attach(model)
    rows = [tiny.row(text, images, seed + number) for number, (text, images) in enumerate(counts)]
    together = generate(model, tiny.batch(rows))
    for number, row in enumerate(rows):
        out = model.generate(
            **row,
            max_new_tokens=STEPS,
            min_new_tokens=STEPS,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
        )
        alone = out.sequences[0, -STEPS:]
        for step in (alone != together[number]).nonzero()[:1, 0].tolist():  # only a tie may part them
            best = out.logits[step][0].topk(2).values
            assert best[0] - best[1] < 1e-5


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_decode_without_cache_equals_cached(attention: str) -> None:
    model, sparsifier = tiny.model(attention), tiny.sparsifier()
    sparsifier.attach(model)
    inputs = tiny.batch([tiny.row(3, 1, 0), tiny.row(12, 2, 1), tiny.row(7, 0, 2)])
    cached = generate(model, inputs)
    kept = sparsifier.report.text_kept
    assert any(not row.all() for row in kept)
    assert torch.equal(generate(model, inputs, use_cache=False), cached)
    assert all(torch.equal(a, b) for a, b in zip(sparsifier.report.text_kept, kept, strict=True))
    assert sparsifier.report.kv_lengths.sum() == 0


@torch.no_grad()
@pytest.mark.parametrize("policy", methods.names("image"))
def test_teacher_forcing_in_one_pass_equals_step_by_step(policy: str) -> None:
    model, sparsifier = tiny.model(), tiny.sparsifier(**tiny.policies(policy))
    sparsifier.attach(model)
    row = tiny.row(8, 1, 3)
    tokens = generate(model, row, 30)
    prompt = row["input_ids"].shape[1]
    out = model(row["input_ids"], row["pixel_values"])
    steps = [out.logits[:, -1]]
    for token in tokens[0, :-1]:
        out = model(token.view(1, 1), past_key_values=out.past_key_values)
        steps.append(out.logits[:, -1])
    kept = sparsifier.report.text_kept[0]

    ids = torch.cat([row["input_ids"], tokens], dim=1)
    answer_mask = torch.zeros_like(ids, dtype=torch.bool)
    answer_mask[:, prompt:] = True
    labels = ids.masked_fill(~answer_mask, -100)
    forced = model(ids, row["pixel_values"], labels=labels, answer_mask=answer_mask)
    torch.testing.assert_close(forced.logits[:, prompt - 1 : -1], torch.stack(steps, dim=1), **CLOSE)
    assert torch.equal(sparsifier.report.text_kept[0][:-1], kept)
    assert 0 < kept.sum() < len(kept)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@torch.no_grad()
def test_attach_then_detach_is_bit_identical(attention: str) -> None:
    model, sparsifier = tiny.model(attention), tiny.sparsifier()
    inputs = tiny.batch([tiny.row(3, 1, 0), tiny.row(9, 1, 1)])
    logits, tokens = model(**inputs).logits, generate(model, inputs)
    names = set(model.state_dict())
    with sparsifier(model):
        assert not torch.equal(generate(model, inputs), tokens)
        assert set(model.state_dict()) > names
    assert torch.equal(model(**inputs).logits, logits)
    assert torch.equal(generate(model, inputs), tokens)
    assert set(model.state_dict()) == names
    assert not hasattr(model, "sparsifier")
    sparsifier.attach(model)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@torch.no_grad()
def test_keep_rate_one_is_the_stock_model(attention: str) -> None:
    model = tiny.model(attention)
    inputs = tiny.batch([tiny.row(3, 1, 0), tiny.row(9, 2, 1), tiny.row(5, 0, 2)])
    logits, tokens = model(**inputs).logits, generate(model, inputs)
    tiny.sparsifier(image_keep_rate=1.0, sparsify_text=False).attach(model)
    torch.testing.assert_close(model(**inputs).logits, logits, **CLOSE)
    assert torch.equal(generate(model, inputs), tokens)
    assert torch.equal(generate(model, inputs, use_cache=False), tokens)


def test_beam_search_with_cache_equals_beam_search_without() -> None:
    model, sparsifier = tiny.model(), tiny.sparsifier()
    sparsifier.attach(model)
    inputs = tiny.batch([tiny.row(3, 1, 0), tiny.row(9, 1, 1)])
    cached = generate(model, inputs, 16, num_beams=3)
    assert not torch.equal(cached, generate(model, inputs, 16))
    assert torch.equal(generate(model, inputs, 16, num_beams=3, use_cache=False), cached)


@torch.no_grad()
def test_new_turn_of_ragged_rows_equals_each_row_alone() -> None:
    """A second picture and question, left-padded, go into a cache that already dropped tokens."""
    model, sparsifier = tiny.model(), tiny.sparsifier()
    sparsifier.attach(model)
    first = [tiny.row(4, 1, 0), tiny.row(11, 1, 1)]
    second = [tiny.row(9, 1, 2), tiny.row(2, 0, 3)]
    answers = torch.randint(4, tiny.VOCABULARY, (2, 20), generator=torch.Generator().manual_seed(0))

    def chat(turn1: dict[str, Tensor], turn2: dict[str, Tensor], answer: Tensor) -> tuple[Tensor, Tensor]:
        mask, past = turn1["attention_mask"], None
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        out = model(**turn1, position_ids=positions)
        for token in [*answer.T, None]:
            turn = (
                turn2
                if token is None
                else {"input_ids": token[:, None], "attention_mask": torch.ones_like(token)[:, None]}
            )
            past, mask = out.past_key_values, torch.cat([mask, turn["attention_mask"]], dim=1)
            positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, -turn["input_ids"].shape[1] :]
            out = model(**turn | {"attention_mask": mask}, position_ids=positions, past_key_values=past)
        return out.logits[:, -1], sparsifier.report.kv_lengths

    together, lengths = chat(tiny.batch(first), tiny.batch(second), answers)
    for row in (0, 1):
        alone, alone_lengths = chat(first[row], second[row], answers[row : row + 1])
        torch.testing.assert_close(alone[0], together[row], **CLOSE)
        assert torch.equal(alone_lengths[:, 0], lengths[:, row])


def test_generate_continues_its_own_cache() -> None:
    model, sparsifier = tiny.model(), tiny.sparsifier()
    sparsifier.attach(model)
    row = tiny.row(5, 1, 0)
    out = model.generate(**row, max_new_tokens=150, do_sample=False, return_dict_in_generate=True)
    longer = generate(model, row, 160)
    rest = model.generate(
        out.sequences,
        attention_mask=torch.ones_like(out.sequences),
        past_key_values=out.past_key_values,
        max_new_tokens=10,
        do_sample=False,
    )
    assert torch.equal(rest[0, -10:], longer[0, -10:])


@torch.no_grad()
def test_hidden_states_and_attentions_are_recorded() -> None:
    model = tiny.model("eager")
    tiny.sparsifier().attach(model)
    row = tiny.row(5, 1, 0)
    out = model(**row, output_hidden_states=True, output_attentions=True)
    fed, kept = row["input_ids"].shape[1], row["input_ids"].shape[1] - 12
    assert [h.shape[1] for h in out.hidden_states] == [fed, fed, fed, kept, kept]
    assert [a.shape[-1] for a in out.attentions] == [fed, fed, kept, kept]


@torch.no_grad()
def test_prompt_given_as_embeddings() -> None:
    model, sparsifier = tiny.model(), tiny.sparsifier()
    sparsifier.attach(model)
    row = tiny.row(5, 1, 0)
    expected = model(**row).logits
    embeds = model.get_input_embeddings()(row.pop("input_ids"))
    torch.testing.assert_close(model(inputs_embeds=embeds, **row).logits, expected, **CLOSE)
    assert len(sparsifier.report.image_kept[0]) == 4


def test_reset_cache_starts_over() -> None:
    model, sparsifier = tiny.model(), tiny.sparsifier()
    sparsifier.attach(model)
    first = model.generate(
        **tiny.row(5, 1, 0), max_new_tokens=9, do_sample=False, return_dict_in_generate=True
    )
    cache = first.past_key_values
    cache.reset()
    assert cache.get_seq_length() == 0
    again = model.generate(**tiny.row(5, 1, 0), past_key_values=cache, max_new_tokens=9, do_sample=False)
    assert torch.equal(again, first.sequences)
    assert len(sparsifier.report.text_kept[0]) == 8


def test_user_given_empty_cache_is_replaced() -> None:
    model = tiny.model()
    tiny.sparsifier().attach(model)
    row = tiny.row(5, 1, 0)
    assert torch.equal(generate(model, row, 12, past_key_values=DynamicCache()), generate(model, row, 12))


def test_cache_filled_in_inference_mode_continues_outside() -> None:
    model = tiny.model()
    tiny.sparsifier().attach(model)
    row, token = tiny.row(5, 1, 0), torch.full((1, 1), 5)
    expected = model(token, past_key_values=model(**row).past_key_values).logits
    with torch.inference_mode():
        past = model(**row).past_key_values
    assert torch.equal(model(token, past_key_values=past).logits, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype) -> None:
    model, sparsifier = tiny.model().to(dtype), tiny.sparsifier()
    sparsifier.attach(model)
    assert next(sparsifier.parameters()).dtype == dtype
    row = tiny.row(5, 1, 0)
    row["pixel_values"] = row["pixel_values"].to(dtype)
    out = model.generate(**row, max_new_tokens=12, do_sample=False, return_dict_in_generate=True)
    assert out.past_key_values.layers[3].keys.dtype == dtype
    assert len(sparsifier.report.image_kept[0]) == 4
