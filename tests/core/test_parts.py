"""The small parts: selection, policies, cache, costs, report."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests import tiny
from torch.nn.attention.flex_attention import create_block_mask

from dynamic_llava import SparsityConfig
from dynamic_llava.core import masks, view
from dynamic_llava.core.report import held
from dynamic_llava.core.slots import BLOCK, Slots
from dynamic_llava.core.spans import ordinals
from dynamic_llava.core.turns import pack
from dynamic_llava.core.view import right_align
from dynamic_llava.costs import flops
from dynamic_llava.costs.shape import DecoderShape
from dynamic_llava.methods.gumbel import exponential_noise, straight_through
from dynamic_llava.methods.predictors import image_predictor_flops, text_predictor_flops
from dynamic_llava.methods.top_k import keep_count, top_k_mask

RATES = st.floats(0.01, 1.0)


@pytest.mark.parametrize(
    ("tokens", "rate", "kept"), [(576, 0.2, 115), (64, 0.2, 12), (16, 0.25, 4), (3, 0.1, 1)]
)
def test_keep_count_truncates(tokens: int, rate: float, kept: int) -> None:
    assert keep_count(tokens, rate) == kept


def test_top_k_keeps_the_best() -> None:
    scores = torch.tensor([[0.1, 0.9, 0.5, 0.7], [3.0, 2.0, 1.0, 0.0]])
    assert top_k_mask(scores, 2).tolist() == [[False, True, False, True], [True, True, False, False]]


@given(st.lists(st.lists(st.booleans(), min_size=7, max_size=7), min_size=1, max_size=5))
def test_right_align_keeps_order(rows: list[list[bool]]) -> None:
    keep = torch.tensor(rows)
    index, valid = right_align(keep)
    assert index.shape[1] == max(sum(row) for row in rows)
    for row, positions, real in zip(rows, index.tolist(), valid.tolist(), strict=True):
        assert [p for p, r in zip(positions, real, strict=True) if r] == [i for i, k in enumerate(row) if k]
        assert real == sorted(real)


def test_straight_through_is_hard_with_a_soft_gradient() -> None:
    torch.manual_seed(0)
    logits = torch.randn(200, 2, requires_grad=True)
    mask = straight_through(logits, 0.5, exponential_noise)
    assert set(mask.tolist()) == {0.0, 1.0}
    mask.sum().backward()
    torch.testing.assert_close(logits.grad[:, 0], -logits.grad[:, 1])
    assert (logits.grad[:, 0] > 0).float().mean() > 0.9


def test_straight_through_samples_the_softmax() -> None:
    torch.manual_seed(0)
    logits = torch.tensor([1.0, 0.0]).expand(20_000, 2)
    assert straight_through(logits, 1.0, exponential_noise).mean().item() == pytest.approx(
        logits[0].softmax(-1)[0].item(), abs=0.01
    )


def test_ordinals_restart_at_each_answer() -> None:
    mask = torch.tensor([[0, 1, 1, 0, 0, 1, 1, 1], [1, 1, 0, 1, 0, 0, 0, 1]]).bool()
    assert ordinals(mask)[mask].tolist() == [0, 1, 0, 1, 2, 0, 1, 0, 0]


def test_visibility_of_padding_and_of_given_masks() -> None:
    cpu = torch.device("cpu")
    mask = torch.tensor([[0, 1, 1]])
    assert masks.visible(mask, 1, 3, cpu)[0, 0].int().tolist() == [[1, 0, 0], [0, 1, 0], [0, 1, 1]]
    assert masks.visible(None, 1, 3, cpu)[0, 0].int().tolist() == [[1, 0, 0], [1, 1, 0], [1, 1, 1]]
    packed = torch.ones(1, 1, 3, 3, dtype=torch.bool)
    assert masks.visible(packed, 1, 3, cpu).equal(packed)
    additive = torch.zeros(1, 1, 3, 3).masked_fill(~masks.visible(mask, 1, 3, cpu), -1e9)
    assert masks.visible(additive, 1, 3, cpu).equal(masks.visible(mask, 1, 3, cpu))


@pytest.mark.parametrize("form", ["bool", "additive", "two-dimensional", "block"])
def test_padding_is_read_from_any_stock_mask(form: str) -> None:
    valid = torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1], [0, 0, 0, 1]]).bool()
    sees = masks.causal(4, valid.device) & valid[:, None, None]
    mask: Any = sees
    if form == "additive":
        mask = torch.zeros(sees.shape).masked_fill(~sees, torch.finfo(torch.float32).min)
    elif form == "two-dimensional":
        mask = valid.long()
    elif form == "block":
        mask = create_block_mask(
            lambda b, h, q, k: (q >= k) & valid[b, k.clamp(max=3)], 3, None, 4, 4, device="cpu"
        )
    assert masks.is_token(mask, 3, 4, 0, valid.device).equal(valid)


def test_only_arguments_with_a_token_axis_are_gathered() -> None:
    index = torch.tensor([[0, 2], [1, 2]])
    positions, rotary = torch.arange(3)[None], torch.randn(1, 3, 4)
    assert view.gather_argument(positions, index, 3).tolist() == [[0, 2], [1, 2]]
    mrope = torch.arange(9).view(3, 1, 3)
    assert view.gather_argument(mrope, index, 3)[1].tolist() == [[3, 5], [4, 5]]
    cos, sin = view.gather_argument((rotary, -rotary), index, 3)
    assert cos.equal(rotary[0, index])
    assert sin.equal(-rotary[0, index])
    other = torch.randn(2, 5, 4)
    assert view.gather_argument(other, index, 3) is other
    assert view.gather_argument("text", index, 3) == "text"


def opened(slots: Slots, columns: list[list[int]]) -> None:
    slots.open(torch.tensor(columns))


def test_dropped_token_is_overwritten_and_storage_grows_only_for_kept_ones() -> None:
    slots = Slots()
    opened(slots, [[0, 1, 2]] * 2)
    slots.extend(torch.tensor([[False, True, True], [True, True, True]]))
    for step in range(3 * BLOCK):
        opened(slots, [[3 + step]] * 2)
        slots.keep(torch.tensor([step % 4 == 0, False]))
    assert slots.length_B.tolist() == [3 + 3 * BLOCK // 4, 3]
    assert slots.tokens_B().tolist() == [2 + 3 * BLOCK // 4, 3]
    assert slots.capacity == BLOCK


def test_decoded_token_sees_kept_tokens_and_itself() -> None:
    slots = Slots()
    opened(slots, [[0, 1]])
    slots.extend(None)
    opened(slots, [[2]])
    assert slots.sees_all
    slots.keep(torch.tensor([False]))
    opened(slots, [[3]])
    columns, valid = slots.seen(None)
    assert columns[valid].tolist() == [0, 1, 3]
    slots.keep(torch.tensor([True]))
    opened(slots, [[4]])
    columns, valid = slots.seen(None)
    assert columns[valid].tolist() == [0, 1, 3, 4]


def test_packing_makes_rows_even_and_loses_nothing() -> None:
    slots = Slots()
    opened(slots, [[0, 1, 2]] * 2)
    slots.extend(torch.tensor([[False, True, True], [True, True, True]]))
    for column, keep in ((3, [True, False]), (4, [True, False])):
        opened(slots, [[column]] * 2)
        slots.keep(torch.tensor(keep))
    before = held(slots, 5)
    from_BS = pack(slots)
    assert slots.is_even
    assert held(slots, 5).equal(before)
    assert from_BS.shape == (2, 4)
    assert slots.column_BS[0, :4].tolist() == [1, 2, 3, 4]
    assert slots.column_BS[1, 1:4].tolist() == [0, 1, 2]


LLAVA_7B = DecoderShape(layers=32, hidden=4096, intermediate=11008, query_width=4096, key_width=4096)
LLAVA_13B = DecoderShape(layers=40, hidden=5120, intermediate=13824, query_width=5120, key_width=5120)


def test_shape_is_read_from_a_config() -> None:
    config = SimpleNamespace(
        num_hidden_layers=2, hidden_size=8, intermediate_size=16, num_attention_heads=4, num_key_value_heads=2
    )
    assert DecoderShape.from_config(config) == DecoderShape(2, 8, 16, 8, 4)


def test_predictor_flops_count_its_weights() -> None:
    sparsifier = tiny.sparsifier()
    weights = sum(p.numel() for p in sparsifier.text_predictor.parameters() if p.ndim > 1)
    assert text_predictor_flops(sparsifier.config, 32) == 2 * weights
    weights = sum(p.numel() for p in sparsifier.image_predictor.parameters() if p.ndim > 1)
    attention = 2 * 4 * 10**2 * 16
    assert image_predictor_flops(sparsifier.config, 32, 10) == 2 * 10 * weights + attention


def test_summary_adds_up() -> None:
    model, sparsifier = tiny.model(), tiny.sparsifier()
    sparsifier.attach(model)
    rows = [tiny.row(4, 1, 0), tiny.row(9, 1, 1)]
    model.generate(**tiny.batch(rows), max_new_tokens=21, do_sample=False)
    report = sparsifier.report
    summary = report.summary()
    fed = [row["input_ids"].shape[1] + 20 for row in rows]
    kept = [n - 12 - int((~text).sum()) for n, text in zip(fed, report.text_kept, strict=True)]
    assert report.kv_lengths.tolist() == [fed, fed, kept, kept]
    per_token = 2 * 2 * 8 * 4  # key and value, two heads of eight float32 numbers
    assert summary["kv_bytes"] == per_token * int(report.kv_lengths.sum())
    assert summary["kv_bytes_dense"] == per_token * 4 * sum(fed)
    assert (summary["image_tokens"], summary["image_tokens_kept"]) == (32, 8)
    assert summary["output_tokens"] == 40
    assert summary["output_tokens_kept"] == sum(int(text.sum()) for text in report.text_kept)
    shape = DecoderShape.from_config(model.config.text_config)
    expected = sum(flops.prefill_flops(shape, n - 20, n - 32, 2) for n in fed)
    expected += 2 * image_predictor_flops(sparsifier.config, 32, 16)
    assert summary["prefill_flops"] == pytest.approx(expected)
    assert summary["prefill_flops"] < summary["prefill_flops_dense"]
    steps = 40 * text_predictor_flops(sparsifier.config, 32)
    for row, n in enumerate(fed):
        held = n - 32
        for step in range(20):
            steps += 2 * shape.layer_flops(1, n - 20 + step + 1) + 2 * shape.layer_flops(1, held + 1)
            held += int(report.text_kept[row][step])
    assert summary["decode_flops"] == pytest.approx(steps)
    assert summary["decode_flops"] < summary["decode_flops_dense"]
    assert 0 < summary["prefill_seconds"] < summary["seconds"]


def test_policy_and_rates_may_change_between_calls() -> None:
    model, sparsifier = tiny.model(), tiny.sparsifier(text_policy="uniform")
    sparsifier.attach(model)
    row = tiny.row(4)
    model.generate(**row, max_new_tokens=11, do_sample=False)
    first = sparsifier.report
    assert first.text_kept[0].sum() == 5
    sparsifier.config.text_keep_rate, sparsifier.config.image_keep_rate = 0.2, 0.5
    model.generate(**row, max_new_tokens=11, do_sample=False)
    assert sparsifier.report.text_kept[0].sum() == 2
    assert len(sparsifier.report.image_kept[0]) == 8
    assert first.text_kept[0].sum() == 5
    assert len(first.image_kept[0]) == 4


def test_uniform_images_are_spread_over_the_picture() -> None:
    model, sparsifier = tiny.model(), tiny.sparsifier(image_policy="uniform")
    sparsifier.attach(model)
    model(**tiny.row(4, images=2))
    assert sparsifier.report.image_kept[0].tolist() == [3, 7, 11, 15, 19, 23, 27, 31]


def test_config_is_copied_into_the_report() -> None:
    model, sparsifier = tiny.model(), tiny.sparsifier()
    sparsifier.attach(model)
    model(**tiny.row(4))
    sparsifier.config.layer = 3
    assert sparsifier.report.config == SparsityConfig(
        image_keep_rate=0.25, d_model=16, nhead=2, dim_feedforward=32
    )
