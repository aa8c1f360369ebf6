"""What training can vary: drawn rates, the bound on dropped keys, a plain softmax; the dial it leaves."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests import tiny
from tests.core.test_training_pass import last_columns, training_pair

from dynamic_llava import SparsityConfig
from dynamic_llava.core.attention.blocked import masked_attention
from dynamic_llava.methods import TrainRates
from dynamic_llava.methods.gumbel import at_rate


@settings(deadline=None)  # a busy machine may pause any example
@given(rate=st.floats(0.02, 0.98), scale=st.floats(0.0, 50.0), seed=st.integers(0, 99))
def test_shifted_logits_keep_the_rate_and_their_ranking(rate: float, scale: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = scale * torch.randn(3, 40, 2, generator=generator)
    valid = torch.rand(3, 40, generator=generator) < 0.7
    valid[:, 0] = True
    shifted = at_rate(logits, rate, valid)
    margin, before = (x[..., 0] - x[..., 1] for x in (shifted, logits))
    share = (margin.sigmoid() * valid).sum(-1) / valid.sum(-1)
    torch.testing.assert_close(share, torch.full((3,), rate), atol=1e-3, rtol=0)
    torch.testing.assert_close(margin - margin[:, :1], before - before[:, :1], atol=1e-3, rtol=1e-4)


@settings(deadline=None)  # a busy machine may pause any example
@given(rate=st.floats(0.05, 0.95), scale=st.floats(0.0, 10.0), seed=st.integers(0, 99))
def test_the_shift_follows_the_logits_in_the_gradient_too(rate: float, scale: float, seed: int) -> None:
    """Numerically, as the shift moves: adding one number to a row's keep logits changes nothing."""
    generator = torch.Generator().manual_seed(seed)
    logits = (scale * torch.randn(2, 12, 2, generator=generator)).requires_grad_()
    weights, direction = torch.randn(2, 2, 12, 1, generator=generator)
    valid = torch.rand(2, 12, generator=generator) < 0.7
    valid[:, 0] = True

    def loss(logits: torch.Tensor) -> torch.Tensor:
        keep, drop = at_rate(logits, rate, valid).unbind(-1)
        return ((keep - drop).sigmoid() * weights[..., 0])[valid].sum()

    (gradient,) = torch.autograd.grad(loss(logits), logits)
    torch.testing.assert_close(
        (gradient[..., 0] * valid).sum(-1),
        torch.zeros(2),
        atol=1e-4 * (1 + gradient.abs().sum().item()),
        rtol=0,
    )
    with torch.no_grad():
        step = 1e-2 * torch.cat([direction, torch.zeros_like(direction)], dim=-1)
        numeric = (loss(logits + step) - loss(logits - step)) / 2
    torch.testing.assert_close((gradient * step).sum(), numeric, atol=1e-3, rtol=2e-2)


@pytest.mark.parametrize("margin", [0.0, 60.0, -1e4])
def test_the_gradient_is_finite_where_no_token_is_in_doubt(margin: float) -> None:
    logits = torch.tensor(
        [[[margin, 0.0], [margin, 0.0], [-margin, 0.0], [-margin, 0.0]]], requires_grad=True
    )
    at_rate(logits, 0.5, torch.ones(1, 4, dtype=torch.bool))[..., 0].square().sum().backward()
    assert logits.grad.isfinite().all()


def test_an_answer_without_tokens_is_left_alone() -> None:
    logits = torch.randn(2, 0, 2)
    assert at_rate(logits, 0.5, torch.zeros(2, 0, dtype=torch.bool)).shape == (2, 0, 2)


@pytest.mark.parametrize(("image", "text"), [(0.1, 0.8), (0.6, 0.2)])
def test_drawn_rates_set_the_share_of_the_samples(image: float, text: float) -> None:
    model, sparsifier = training_pair(min_answer_length=1)
    sparsifier.train_rates = TrainRates(image, text)
    inputs = tiny.batch([tiny.row(70, 2, row) for row in range(8)])
    answer_mask = last_columns(inputs, *[60] * 8)
    torch.manual_seed(0)
    model(**inputs, answer_mask=answer_mask)
    sampled = sparsifier.sampled
    assert torch.cat(sampled.image_masks).mean().item() == pytest.approx(image, abs=0.1)
    assert sampled.text_mask_BN[answer_mask].mean().item() == pytest.approx(text, abs=0.1)


def test_margin_quantiles_make_the_output_rate_a_dial() -> None:
    margins = torch.linspace(-3.0, 5.0, 200)
    quantiles = tuple(margins.quantile(torch.linspace(0, 1, 41)).tolist())
    for rate in (0.2, 0.5, 0.77):
        config = SparsityConfig(text_keep_rate=rate, text_margins=quantiles)
        assert (margins > config.text_threshold).float().mean().item() == pytest.approx(rate, abs=0.01)
    assert SparsityConfig(text_keep_rate=0.2).text_threshold == 0.0


@pytest.mark.parametrize("margins", [(1.0,), (0.0, 2.0, 1.0)])
def test_wrong_quantiles_are_refused(margins: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match="text_margins"):
        SparsityConfig(text_margins=margins)


def test_the_dial_changes_what_decoding_keeps() -> None:
    model, sparsifier = tiny.model(), tiny.sparsifier()
    sparsifier.attach(model)
    inputs = tiny.batch([tiny.row(6, 1, row) for row in range(4)])
    margins: list[torch.Tensor] = []
    sparsifier.text_predictor.register_forward_hook(
        lambda _, __, logits: margins.append(logits[..., 0] - logits[..., 1])
    )
    tokens = 60

    def kept() -> float:
        model.generate(**inputs, max_new_tokens=tokens, do_sample=False)
        return torch.stack(list(sparsifier.report.text_kept)).float().mean().item()

    kept()
    quantiles = torch.cat([m.flatten() for m in margins]).quantile(torch.linspace(0, 1, 41))
    sparsifier.config.text_margins = tuple(quantiles.tolist())
    shares = []
    for rate in (0.1, 0.9):
        sparsifier.config.text_keep_rate = rate
        shares.append(kept())
    assert shares[0] < 0.4 < 0.6 < shares[1]


@pytest.mark.parametrize("bound", [1.0, 100.0])
def test_the_bound_limits_the_gradient_of_a_dropped_dominant_key_and_nothing_else(bound: float) -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 2, 6, 4, dtype=torch.float64, requires_grad=True) for _ in range(3))
    with torch.no_grad():
        k[:, :, 1] *= 30.0
    grads = []
    for limit in (1e6, bound):
        policy = torch.tensor([[1.0, 0.0, 1.0, 1.0, 1.0, 1.0]], dtype=torch.float64, requires_grad=True)
        out = masked_attention(q, k, v, policy, None, 1.0, limit)
        grads.append(torch.autograd.grad(out.square().sum(), (q, k, v, policy)))
    free, bounded = grads
    assert free[3][0, 1].abs() > 1e4 > 1e3 * bound > bounded[3][0, 1].abs() or bound == 100.0
    assert bounded[3][0, 1].abs() < 100 * bound
    for mine, theirs in zip(bounded[:3], free[:3], strict=True):
        torch.testing.assert_close(mine, theirs)
    torch.testing.assert_close(bounded[3][0, 2:], free[3][0, 2:])


def test_without_masked_softmax_dropped_keys_keep_their_weight_and_lose_their_values() -> None:
    """One query, two keys of equal score: with the masked softmax the kept one gets all."""
    from dynamic_llava.core.attention.interface import KeyWeights

    q = k = torch.zeros(1, 1, 2, 2)
    v = torch.tensor([[[[1.0, 0.0], [0.0, 1.0]]]])
    policy = torch.tensor([[0.0, 1.0]])
    visible = torch.ones(1, 1, 2, 2, dtype=torch.bool).tril()
    out = {
        masked: KeyWeights(policy, 0.0, 1.0, masked).attend(q, k, v, visible, 1.0)[0, 0, 1].tolist()
        for masked in (True, False)
    }
    assert out == {True: [0.0, 1.0], False: [0.0, 0.5]}
