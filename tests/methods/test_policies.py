"""What defines each method of dropping tokens."""

from __future__ import annotations

import pytest
import torch
from tests import tiny

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
