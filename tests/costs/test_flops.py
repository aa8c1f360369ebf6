"""Counted costs: the paper's numbers, what a run reports, and order between dense and sparse."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests import tiny

from dynamic_llava import SparsityConfig
from dynamic_llava.costs import compare, flops
from dynamic_llava.costs.presets import PRESETS, preset
from dynamic_llava.costs.shape import DecoderShape
from dynamic_llava.methods.predictors import image_predictor_flops, text_predictor_flops
from dynamic_llava.methods.top_k import keep_count

RATES = st.floats(0.001, 1.0)
UNTIMED = settings(deadline=None)  # a busy machine may pause any example
DEFAULTS: dict[str, Any] = {
    "preset": "llava-1.5-7b", "text_tokens": 60, "output_tokens": 159, "layer": 2, "image_keep_rate": 0.2,
    "text_keep_rate": 0.5, "fastv_layer": 3, "fastv_keep_rate": 0.25,
}  # fmt: skip


def plan(**changes: Any) -> compare.Settings:
    return compare.Settings(**DEFAULTS | changes)


# The paper's numbers


@pytest.mark.parametrize(
    ("name", "dense", "sparse", "fastv"),
    [("llava-1.5-7b", 10.1, 2.5, 3.2), ("llava-1.5-13b", 19.6, 4.7, 6.0)],
)
def test_prefill_of_the_paper(name: str, dense: float, sparse: float, fastv: float) -> None:
    compared = compare.compare(plan(preset=name))
    printed = {method: round(cost.prefill_flops_paper / 1e12, 1) for method, cost in compared.items()}
    assert printed == {"dense": dense, "fastv": fastv, "dynamic_llava": sparse}


@pytest.mark.parametrize(
    ("name", "dense", "sparse"), [("llava-1.5-7b", 7.63, 1.88), ("llava-1.5-13b", 14.89, 3.53)]
)
def test_true_prefill_of_the_image_tokens(name: str, dense: float, sparse: float) -> None:
    """Linear layers with the gated feed-forward, and attention over the full square."""
    shape = preset(name).shape
    assert round(flops.prefill_flops(shape, 576, 576, 2) / 1e12, 2) == dense
    assert round(flops.prefill_flops(shape, 576, 115, 2) / 1e12, 2) == sparse


@pytest.mark.parametrize(
    ("name", "tokens", "kept", "tflops"),
    [
        ("llava-1.5-7b", 159, 159, 2.75),
        ("llava-1.5-7b", 159, 84, 1.52),
        ("llava-1.5-7b", 159, 41, 0.84),
        ("llava-1.5-7b", 159, 129, 2.26),
        ("llava-1.5-7b", 351, 351, 6.12),
        ("llava-1.5-7b", 351, 182, 3.33),
        ("llava-1.5-13b", 159, 159, 5.36),
        ("llava-1.5-13b", 159, 84, 2.95),
        ("llava-1.5-13b", 351, 351, 11.92),
        ("llava-1.5-13b", 351, 181, 6.40),
    ],
)
def test_decoding_of_the_paper(name: str, tokens: int, kept: int, tflops: float) -> None:
    """Tables 3 and 17 on LVIS-VQA; tokens are rounded means over answers, hence the tolerance."""
    assert flops.paper_flops(preset(name).shape, tokens, kept, 2) / 1e12 == pytest.approx(tflops, rel=0.01)


def test_decoding_of_the_paper_to_the_digit() -> None:
    """The printed 1.52 asks for 83.2 to 83.8 kept tokens: inferred, the paper prints 84 of 159."""
    sparse = compare.compare(plan(text_keep_rate=83.6 / 159))["dynamic_llava"]
    assert sparse.output_tokens_kept == pytest.approx(83.6)
    assert round(sparse.decode_flops_paper / 1e12, 2) == 1.52


@pytest.mark.parametrize("name", ["llava-1.5-7b", "llava-1.5-13b"])
def test_image_predictor_of_the_paper(name: str) -> None:
    """Table 12 prints its cost as + 0.01 TFLOPs."""
    cost = image_predictor_flops(SparsityConfig(), preset(name).shape.hidden, 576)
    assert round(cost / 1e12, 2) == 0.01


# What a run reports


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize(("rate", "tolerance"), [(1.0, 1e-12), (0.5, 0.01)])
def test_counts_are_those_of_a_run(use_cache: bool, rate: float, tolerance: float) -> None:
    """Policies without predictors; kept tokens are whole in a run, so half of them differ a little."""
    model = tiny.model()
    sparsifier = tiny.sparsifier(image_policy="uniform", text_policy="uniform", text_keep_rate=rate)
    sparsifier.attach(model)
    model.generate(**tiny.row(4), max_new_tokens=21, do_sample=False, use_cache=use_cache)
    summary = sparsifier.report.summary()
    shape = DecoderShape.from_config(model.config.text_config)
    answering = flops.Answering(shape, 2, prompt=21, prompt_kept=9, output=20, output_keep_rate=rate)
    counted = answering.cached_flops if use_cache else answering.uncached_flops
    assert summary["prefill_flops"] == flops.prefill_flops(shape, 21, 9, 2)
    assert summary["decode_flops"] == pytest.approx(counted, rel=tolerance)
    if use_cache:
        assert summary["kv_bytes"] == pytest.approx(answering.kv_bytes(4), rel=tolerance)


@UNTIMED
@given(st.integers(1, 50), st.integers(0, 700), st.integers(0, 700), RATES)
def test_steps_add_up(output: int, prompt: int, dropped: int, rate: float) -> None:
    shape, kept = preset("nano").shape, max(0, prompt - dropped)
    answering = flops.Answering(shape, 2, prompt, kept, output, rate)
    cached = uncached = 0.0
    for step in range(output):
        cached += 2 * shape.layer_flops(1, prompt + step + 1)
        cached += (shape.layers - 2) * shape.layer_flops(1, kept + rate * step + 1)
        uncached += flops.prefill_flops(shape, prompt + step + 1, kept + rate * step + 1, 2)
    assert answering.cached_flops == pytest.approx(cached)
    assert answering.uncached_flops == pytest.approx(uncached)


def test_predictors_are_counted_where_tokens_are_dropped() -> None:
    chosen, config = preset("llava-1.5-7b"), SparsityConfig()
    image = image_predictor_flops(config, 4096, 576)
    text = text_predictor_flops(config, 4096)
    sparse = compare.compare(plan())["dynamic_llava"]
    answering = flops.Answering(chosen.shape, 2, 636, 175, 159, 0.5)
    assert sparse.prefill_flops == flops.prefill_flops(chosen.shape, 636, 175, 2) + image
    assert sparse.decode_flops_cached == answering.cached_flops + 159 * text
    decisions = 159 * 160 / 2
    expected = answering.uncached_flops + 159 * image + decisions * text
    assert sparse.decode_flops_uncached == pytest.approx(expected)


# Order


def all_flops(name: str, layer: int, image_rate: float, text_rate: float, text: int, out: int) -> list[float]:
    """Every count of flops.py, without predictors."""
    shape, images = PRESETS[name].shape, PRESETS[name].image_tokens
    kept = keep_count(images, image_rate)
    answering = flops.Answering(shape, layer, images + text, kept + text, out, text_rate)
    return [
        flops.paper_flops(shape, images, kept, layer),
        flops.paper_flops(shape, out, text_rate * out, layer),
        flops.prefill_flops(shape, images + text, kept + text, layer),
        answering.cached_flops,
        answering.uncached_flops,
        answering.kv_bytes(2),
    ]


def not_more(less: list[float], more: list[float]) -> bool:
    return all(a <= b * (1 + 1e-12) for a, b in zip(less, more, strict=True))


@UNTIMED
@given(
    st.sampled_from(sorted(PRESETS)), st.integers(1, 7), RATES, RATES, RATES, RATES,
    st.integers(0, 300), st.integers(1, 3000),
)  # fmt: skip
def test_dropping_more_never_costs_more(
    name: str, layer: int, image_a: float, image_b: float, text_a: float, text_b: float, text: int, out: int
) -> None:
    image_low, image_high = sorted((image_a, image_b))
    text_low, text_high = sorted((text_a, text_b))
    sparse = all_flops(name, layer, image_low, text_low, text, out)
    assert not_more(sparse, all_flops(name, layer, image_high, text_low, text, out))
    assert not_more(sparse, all_flops(name, layer, image_low, text_high, text, out))
    assert not_more(sparse, all_flops(name, layer, 1.0, 1.0, text, out))
    assert not_more(sparse, all_flops(name, layer + 1, image_low, text_low, text, out))


@UNTIMED
@given(st.sampled_from(sorted(PRESETS)), st.integers(1, 7), st.integers(0, 300), st.integers(1, 3000))
def test_keeping_all_is_dense(name: str, layer: int, text: int, out: int) -> None:
    compared = compare.compare(
        plan(
            preset=name, layer=layer, fastv_layer=layer, text_tokens=text, output_tokens=out,
            image_keep_rate=1.0, text_keep_rate=1.0, fastv_keep_rate=1.0,
        )
    )  # fmt: skip
    assert compared["dense"] == compared["fastv"] == compared["dynamic_llava"]
    assert compared["dense"].prefill_speedup_bound == 1


@UNTIMED
@given(st.sampled_from(sorted(PRESETS)), st.integers(1, 7), RATES, st.integers(0, 300), st.integers(1, 3000))
def test_fastv_never_costs_more_than_dense(name: str, layer: int, rate: float, text: int, out: int) -> None:
    compared = compare.compare(
        plan(preset=name, fastv_layer=layer, fastv_keep_rate=rate, text_tokens=text, output_tokens=out)
    )
    fastv, dense = asdict(compared["fastv"]), asdict(compared["dense"])
    assert fastv.pop("prefill_speedup_bound") >= dense.pop("prefill_speedup_bound") == 1
    assert not_more(list(fastv.values()), list(dense.values()))


# Bad input


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("preset", "llava-9", "is no preset: choose one of nano"),
        ("layer", 0, "layer is 0: llava-1.5-7b has 32 layers, choose 1 to 31"),
        ("fastv_layer", 32, "fastv_layer is 32: llava-1.5-7b has 32 layers, choose 1 to 31"),
        ("image_keep_rate", 0.0, "image_keep_rate is 0.0: a keep rate must be greater than 0 and at most 1"),
        ("text_keep_rate", float("nan"), "text_keep_rate is nan: a keep rate"),
        ("fastv_keep_rate", 1.5, "fastv_keep_rate is 1.5: a keep rate"),
        ("text_tokens", -1, "text_tokens is -1: it must be at least 0"),
        ("output_tokens", 0, "output_tokens is 0: it must be at least 1"),
    ],
)
def test_settings_out_of_range(name: str, value: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plan(**{name: value})
