"""What defines each method of dropping tokens."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests import tiny
from torch import Tensor

from dynamic_llava import methods
from dynamic_llava.methods import Outputs, Pictures
from dynamic_llava.methods.top_k import keep_count, top_k_mask

RATES = st.floats(0.01, 1)

PADDED = [tiny.row(4, 1, 0), tiny.row(9, 2, 1)]


@torch.no_grad()
@pytest.mark.parametrize("key_heads", [2, 4])
def test_fastv_keeps_what_the_last_token_attends_to(key_heads: int) -> None:
    """Against the attention weights that transformers returns itself."""
    inputs = tiny.batch(PADDED)
    model = tiny.model("eager", key_heads=key_heads)
    weights_BHNN = model(**inputs, output_attentions=True).attentions[1]
    attention_BN = weights_BHNN[:, :, -1].mean(1)
    tiny.sparsifier(image_policy="fastv", image_keep_rate=0.25).attach(model)
    model(**inputs)
    report = model.sparsifier.report
    for row, kept in enumerate(report.image_kept):
        is_image = inputs["input_ids"][row] == tiny.IMAGE_TOKEN
        pictures = attention_BN[row, is_image].view(-1, tiny.IMAGE_TOKENS)
        best = pictures.topk(4).indices + tiny.IMAGE_TOKENS * torch.arange(len(pictures))[:, None]
        assert kept.tolist() == best.sort(-1).values.flatten().tolist()
        for scores, expected in zip(report.image_scores[row], pictures, strict=True):
            torch.testing.assert_close(scores, expected, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_fastv_drops_no_output_tokens() -> None:
    model = tiny.model()
    tiny.sparsifier(image_policy="fastv", sparsify_text=False).attach(model)
    model.generate(**tiny.batch(PADDED), max_new_tokens=9, do_sample=False)
    assert all(row.all() for row in model.sparsifier.report.text_kept)


@torch.no_grad()
def test_fastv_of_a_second_picture_sees_the_first_turn() -> None:
    """The attention is that of the whole context, which the cache holds."""
    whole, turn = tiny.row(5, 2, 3), slice(1 + tiny.IMAGE_TOKENS, None)
    ids = torch.cat([whole["input_ids"][:, : turn.start], whole["input_ids"][:, 1:][:, turn.start - 1 :]], 1)
    model = tiny.model("eager")
    weights_BHNN = model(ids, whole["pixel_values"], output_attentions=True).attentions[1]
    expected = weights_BHNN[0, :, -1].mean(0)[ids[0] == tiny.IMAGE_TOKEN][tiny.IMAGE_TOKENS :]
    tiny.sparsifier(image_policy="fastv").attach(model)
    past = model(ids[:, : turn.start], whole["pixel_values"][:1]).past_key_values
    model(ids[:, turn], whole["pixel_values"][1:], past_key_values=past)
    torch.testing.assert_close(model.sparsifier.report.image_scores[0][1], expected, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_fastv_in_one_pass_needs_one_turn_a_row() -> None:
    """No prompt token sees a picture that comes after the answer, and packed rows have many last tokens."""
    row = tiny.row(5, 2, 3)
    model = tiny.model()
    tiny.sparsifier(image_policy="fastv").attach(model)
    answer_mask = torch.zeros_like(row["input_ids"], dtype=torch.bool)
    answer_mask[:, 0] = True
    with pytest.raises(ValueError, match="ranks by the last prompt token"):
        model(**row, answer_mask=answer_mask)
    packed = torch.ones(1, 1, row["input_ids"].shape[1], row["input_ids"].shape[1]).tril().bool()
    with pytest.raises(ValueError, match="ranks by the last prompt token"):
        model(**row | {"attention_mask": packed}, answer_mask=torch.zeros_like(answer_mask))


def test_fastv_is_no_policy_of_output_tokens() -> None:
    with pytest.raises(ValueError, match="text_policy is 'fastv'"):
        tiny.sparsifier(text_policy="fastv")


@given(RATES, st.integers(1, 700))
def test_uniform_is_exact_and_evenly_spaced(rate: float, tokens: int) -> None:
    outputs = Outputs(torch.zeros(1, tokens, 4), torch.arange(tokens)[None], rate)
    keep = methods.output_method("uniform", {}).keep(outputs)[0]
    assert abs(int(keep.sum()) - tokens * rate) < 1
    gaps = keep.nonzero()[:, 0].diff()
    assert gaps.numel() == 0 or gaps.max() - gaps.min() <= 1


def test_random_depends_on_seed_and_index_only() -> None:
    hidden, ordinal = torch.randn(3, 5000, 4), torch.arange(5000).expand(3, -1)
    method = methods.output_method("random", {})
    keep = method.keep(Outputs(hidden, ordinal, 0.3, seed=5))
    assert torch.equal(keep[0], keep[2])
    alone = method.keep(Outputs(hidden[:1, 70:71], ordinal[:1, 70:71], 0.3, seed=5))
    assert torch.equal(alone[0], keep[0, 70:71])
    assert keep.float().mean().item() == pytest.approx(0.3, abs=0.03)
    assert not torch.equal(method.keep(Outputs(hidden, ordinal, 0.3, seed=6)), keep)
    scores = methods.image_method("random", {}).score(Pictures(hidden, 0.3, seed=5))
    assert scores.shape == (3, 5000)
    assert scores[0].unique().numel() == 5000


def test_confident_scores_keep_their_order() -> None:
    """In float32, ``log_softmax`` is 0 for every margin above 17."""

    class Sure(torch.nn.Module):
        def forward(self, hidden_KIC: Tensor) -> Tensor:
            margin_KI = torch.tensor([[20.0, 60.0, 30.0, 40.0]])
            return torch.stack([margin_KI, 0 * margin_KI], -1)

    pictures = Pictures(torch.zeros(1, 4, 8), 0.5, predictor=Sure())
    assert methods.image_method("learned", {}).score(pictures).argsort().tolist() == [[0, 2, 3, 1]]


def chosen(hidden_KIC: Tensor, rate: float) -> Tensor:
    scores_KI = methods.image_method("divprune", {}).score(Pictures(hidden_KIC, rate))
    return top_k_mask(scores_KI, keep_count(hidden_KIC.shape[1], rate))


@given(st.integers(2, 40), RATES, st.integers(0, 99))
def test_divprune_is_the_greedy_max_min_choice(tokens: int, rate: float, seed: int) -> None:
    """Each token that was added is the farthest from those before it, by the definition alone."""
    hidden_IC = torch.randn(tokens, 5, generator=torch.Generator().manual_seed(seed))
    unit = hidden_IC.double() / hidden_IC.double().norm(dim=-1, keepdim=True)
    distance = 1 - unit @ unit.T
    others = distance + torch.diag(torch.full((tokens,), torch.inf))
    order = [int(others.amin(0).argmax())]
    while len(order) < keep_count(tokens, rate):
        left = [token for token in range(tokens) if token not in order]
        order.append(max(left, key=lambda token: distance[token, order].min().item()))
    assert chosen(hidden_IC[None].double(), rate)[0].nonzero().flatten().tolist() == sorted(order)


def test_divprune_takes_one_of_each_kind() -> None:
    """Of four clusters, four tokens are one of each; no ranking of single tokens promises that."""
    kinds = torch.eye(4).repeat_interleave(6, 0) + 0.01 * torch.randn(24, 4)
    assert chosen(kinds[None], 4 / 24).view(4, 6).sum(-1).tolist() == [1, 1, 1, 1]


def test_divprune_of_equal_tokens_keeps_the_number_asked_for() -> None:
    assert chosen(torch.ones(2, 10, 3), 0.5).sum(-1).tolist() == [5, 5]
