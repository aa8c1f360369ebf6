"""The harness measures the right things: same weights, same tokens, same logits where nothing is dropped."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from tests.bench.conftest import IMAGE_TOKENS, TEXT_TOKENS, TINY, settings
from torch import Tensor

from dynamic_llava import methods
from dynamic_llava.bench import phases, run
from dynamic_llava.bench.bounds import Work, weight_bytes
from dynamic_llava.bench.building import BLOCK, PARTS, Subject, fill, materialise, skeleton
from dynamic_llava.bench.contenders import Contender, Session, attached, stock
from dynamic_llava.bench.run import _contender
from dynamic_llava.bench.workload import Workload, draw
from dynamic_llava.costs.presets import PRESETS
from dynamic_llava.costs.shape import DecoderShape

PROMPT, OUTPUT = IMAGE_TOKENS + TEXT_TOKENS, 40


@pytest.fixture
def subject() -> Subject:
    model = materialise(skeleton(TINY, None), torch.float32, torch.device("cpu"), seed=0)
    return Subject(model, TINY.image_tokens, TINY.predictor)


@pytest.fixture
def work(subject: Subject) -> Workload:
    return draw(subject, batch=3, text_tokens=TEXT_TOKENS, output=OUTPUT, seed=0)


def contender(subject: Subject, work: Workload, name: str, **changes: Any) -> Contender:
    if name in ("dense", "static"):
        return stock(subject, name)
    made = attached(subject, name, settings(**changes).sparsity(name, subject.predictor))
    made.calibrate(work)
    return made


@torch.inference_mode()
def logits_of(contender: Contender, work: Workload) -> Tensor:
    """Logits after the prompt and after every output token."""
    session = Session(contender, work, compiled=False)
    return torch.cat([session.prefill(), *(session.step(number) for number in range(work.output))], dim=1)


@pytest.mark.parametrize("name", ["static", "preallocated", *methods.names("image")])
def test_logits_equal_dense_where_nothing_is_dropped(subject: Subject, work: Workload, name: str) -> None:
    dense = logits_of(stock(subject, "dense"), work)
    same = contender(subject, work, name, image_keep_rate=1.0, text_keep_rate=1.0)
    torch.testing.assert_close(logits_of(same, work), dense, atol=2e-5, rtol=0)
    assert dense.std() > 0.1


@pytest.mark.parametrize("name", ["learned", "uniform", "fastv"])
def test_dropping_changes_logits_and_the_step_without_cache_agrees(
    subject: Subject, work: Workload, name: str
) -> None:
    sparse = contender(subject, work, name)
    logits = logits_of(sparse, work)
    assert (logits - logits_of(stock(subject, "dense"), work)).abs().max() > 1e-2
    with torch.inference_mode():
        last = phases.uncached_step(sparse, work)
    torch.testing.assert_close(last[:, -1], logits[:, -1], atol=2e-5, rtol=0)


def test_every_contender_decodes_the_same_tokens(subject: Subject, work: Workload) -> None:
    fed: dict[str, list[Tensor]] = {}
    contenders = [contender(subject, work, name) for name in ("preallocated", "learned", "uniform")]
    for each in contenders:
        seen = fed.setdefault(each.name, [])
        each.model.register_forward_pre_hook(
            lambda _, args, given, seen=seen: seen.append(given["input_ids"].clone()), with_kwargs=True
        )
    with torch.inference_mode():
        phases.decode(contenders, work, bandwidth=1.0, compiled=False, tick=lambda: None)
    expected = torch.cat([work.prompt_BN, work.fed_BT], dim=1)
    for seen in fed.values():
        assert torch.equal(torch.cat(seen, dim=1), expected)


def test_downsampling_is_a_dense_pass_over_fewer_image_tokens(subject: Subject, work: Workload) -> None:
    smaller = _contender(subject, settings(image_keep_rate=0.6), "downsample")
    given = smaller.given(work)
    assert (given.prompt, given.image_tokens) == (PROMPT - 7, 9)  # 3 x 3 of 4 x 4
    assert torch.equal(given.prompt_BN[:, -TEXT_TOKENS + 1 :], work.prompt_BN[:, -TEXT_TOKENS + 1 :])
    dense = stock(subject, "dense")
    expected = logits_of(dense, given)
    torch.testing.assert_close(logits_of(smaller, work), expected, atol=2e-5, rtol=0)
    with torch.inference_mode():
        last = phases.uncached_step(smaller, work)
    torch.testing.assert_close(last[:, -1], expected[:, -1], atol=2e-5, rtol=0)
    with torch.inference_mode():
        results = phases.prefill([dense, smaller], work.part(3, 0), 1.0, 1, tick=lambda: None)
    assert results["downsample"]["flops"] == Work(dense, given).prefill_flops()
    assert results["downsample"]["bound"] == pytest.approx(
        Work(dense, work).prefill_flops() / Work(dense, given).prefill_flops()
    )


def test_contenders_share_their_weights(subject: Subject, work: Workload) -> None:
    learned = contender(subject, work, "learned")
    own = dict(learned.model.named_parameters())
    for name, parameter in subject.model.named_parameters():
        assert own[name] is parameter
    assert not hasattr(subject.model, "sparsifier")


@pytest.mark.parametrize("rate", [0.2, 0.5, 0.8, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_learned_decisions_keep_the_share_asked_for(rate: float, dtype: torch.dtype) -> None:
    model = materialise(skeleton(TINY, None), dtype, torch.device("cpu"), seed=0)
    subject = Subject(model, TINY.image_tokens, TINY.predictor)
    work = draw(subject, batch=4, text_tokens=TEXT_TOKENS, output=OUTPUT, seed=0)
    session = Session(contender(subject, work, "learned", text_keep_rate=rate), work, compiled=False)
    with torch.inference_mode():
        session.prefill()
        for number in range(OUTPUT):
            session.step(number)
    assert session.kept_share() == pytest.approx(rate, abs=0.06)


def test_cache_bytes(subject: Subject, work: Workload) -> None:
    one = 2 * 32 * 4  # key and value, width, float32
    tokens = 3 * (PROMPT + OUTPUT)
    held = {}
    for name in ("dense", "static", "preallocated", "fastv"):
        session = Session(contender(subject, work, name), work, compiled=False)
        with torch.inference_mode():
            session.prefill()
            for number in range(OUTPUT):
                session.step(number)
        held[name] = session.held_bytes(PROMPT + OUTPUT)
        assert session.allocated_bytes() >= held[name]
        if name != "fastv":
            assert session.allocated_bytes() == held[name] == 4 * tokens * one
    assert held["fastv"] == (2 * tokens + 2 * (tokens - 3 * 12)) * one  # 4 of 16 image tokens stay


def test_bounds_by_hand(subject: Subject, work: Workload) -> None:
    dense, learned = contender(subject, work, "dense"), contender(subject, work, "learned")
    linear = 4 * 32 * 32 + 3 * 32 * 64

    def layer(tokens: int) -> int:
        return 2 * tokens * linear + 4 * tokens * tokens * 32

    head, scoring = 2 * 32 * 64, 2 * 16 * (32 * 16 + 16 * 8 + 8 * 4 + 4 * 2)
    scoring += 2 * (2 * 16 * (4 * 16 * 16 + 2 * 16 * 32) + 4 * 16 * 16 * 16)
    assert Work(dense, work).prefill_flops() == 3 * (4 * layer(22) + head)
    assert Work(learned, work).prefill_flops() == 3 * (2 * layer(22) + 2 * layer(10) + head + scoring)

    weights = 4 * (4 * (linear + 2 * 32) + 32 + 64 * 32)
    assert weight_bytes(subject.model) == weights
    one = 2 * 32 * 4
    # Two steps, after 8 and 9 output tokens: 31 and 32 tokens with their own; half of the earlier ones stay.
    assert Work(dense, work).decode_bytes(8, 9) == weights + 3 * one * 4 * 31.5
    predictor = 4 * (2 * 32 + 33 * 16 + 17 * 8 + 9 * 4 + 5 * 2)
    sparse = weights + predictor + 3 * one * (2 * 31.5 + 2 * (10 + 4.25 + 1))
    assert Work(learned, work, kept_share=0.5).decode_bytes(8, 9) == sparse


def test_weights_have_unit_gain_and_no_tiny_numbers() -> None:
    weight, other, vector = torch.empty(1200, 900), torch.empty(1200, 900), torch.empty(9)
    fill([weight, other, vector], seed=0)
    assert weight.numel() > BLOCK
    assert weight.std() == pytest.approx(900**-0.5, rel=0.01)
    assert weight.abs().min() > 0.4 * 900**-0.5
    assert (weight == other).float().mean() < 0.01
    assert torch.equal(vector, torch.ones(9))


@pytest.mark.parametrize("output", [1, 5, 20, 47, 100])
def test_chunks_cover_every_timed_token(output: int) -> None:
    chunks = phases.chunks_of(output + phases.WARM_UP)
    covered = [number for start, stop in chunks for number in range(start, stop)]
    assert covered == list(range(phases.WARM_UP, output + phases.WARM_UP))


@pytest.mark.parametrize("model_type", PARTS)
def test_every_family_of_the_presets_runs(model_type: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the presets' own parts, in small: heads of 128 as the rotary sections of Qwen-VL want them."""
    shape = DecoderShape(layers=4, hidden=256, intermediate=64, query_width=256, key_width=128)
    small = replace(TINY, shape=shape, heads=2, model_type=model_type)
    monkeypatch.setitem(PRESETS, "tiny", small)
    result = run(settings(contenders=("dense", "learned", "uniform")), lambda name, turns: lambda: None)
    assert DecoderShape.from_config(skeleton(small, None).config.text_config) == shape
    (point,) = result["phases"]["decode"]
    assert point["contenders"]["uniform"]["kept_output_share"] == pytest.approx(0.5, abs=0.1)
    assert (
        point["contenders"]["uniform"]["cache_bytes_held"] < point["contenders"]["dense"]["cache_bytes_held"]
    )
