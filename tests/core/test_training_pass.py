"""The masked pass in training: exemptions, penalties, packed rows, gradient checkpointing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests import tiny

from dynamic_llava import Sparsifier


def training_pair(**settings: Any) -> tuple[Any, Sparsifier]:
    model, sparsifier = tiny.model(), tiny.sparsifier(**settings)
    sparsifier.attach(model)
    model.train()
    return model, sparsifier


def last_columns(inputs: dict[str, torch.Tensor], *counts: int) -> torch.Tensor:
    """Mark the last ``counts[row]`` tokens of each row as the answer."""
    mask = torch.zeros_like(inputs["input_ids"], dtype=torch.bool)
    for row, count in zip(mask, counts, strict=True):
        row[len(row) - count :] = True
    return mask


def test_short_answers_keep_everything_and_pay_nothing() -> None:
    model, sparsifier = training_pair(min_answer_length=6)
    inputs = tiny.batch([tiny.row(12, 1, 0), tiny.row(12, 1, 1), tiny.row(12, 1, 2)])
    answer_mask = last_columns(inputs, 6, 5, 0)
    model(**inputs, answer_mask=answer_mask)
    text_mask = sparsifier.sampled.text_mask_BN
    assert text_mask[1:].eq(1).all()
    assert text_mask[0][~answer_mask[0]].eq(1).all()
    kept = text_mask[0][answer_mask[0]]
    image_loss, text_loss, _ = sparsifier.ratio_loss()
    torch.testing.assert_close(text_loss, (0.5 - kept.mean()) ** 2 / 3)
    torch.testing.assert_close(
        image_loss, (0.25 - torch.stack(sparsifier.sampled.image_masks).mean(1)).square().mean()
    )


def test_gradients_reach_both_predictors_also_through_dropped_keys() -> None:
    model, sparsifier = training_pair(min_answer_length=1)
    inputs = tiny.batch([tiny.row(14, 1, 0), tiny.row(14, 1, 1)])
    out = model(**inputs, labels=inputs["input_ids"], answer_mask=last_columns(inputs, 10, 10))
    assert torch.stack(sparsifier.sampled.image_masks).eq(0).any()
    out.loss.backward()
    for name, parameter in sparsifier.named_parameters():
        assert parameter.grad.abs().max() > 0, name


def test_masks_are_exactly_hard() -> None:
    model, sparsifier = training_pair(min_answer_length=1)
    inputs = tiny.batch([tiny.row(14, 2, 0), tiny.row(14, 1, 1)])
    model(**inputs, answer_mask=last_columns(inputs, 10, 9))
    masks = [torch.stack(sparsifier.sampled.image_masks), sparsifier.sampled.text_mask_BN]
    assert set(torch.cat([mask.flatten() for mask in masks]).tolist()) == {0.0, 1.0}
    assert torch.stack(sparsifier.sampled.image_masks).shape == (3, tiny.IMAGE_TOKENS)


def test_penalties_of_what_is_not_sparsified_are_zero() -> None:
    model, sparsifier = training_pair(min_answer_length=1, sparsify_text=False)
    inputs = tiny.batch([tiny.row(14, 1, 0)])
    model(**inputs, answer_mask=last_columns(inputs, 10))
    image_loss, text_loss, _ = sparsifier.ratio_loss()
    assert image_loss > 0
    assert text_loss == 0
    assert sparsifier.sampled.text_mask_BN.eq(1).all()


def test_ratio_loss_needs_a_training_pass() -> None:
    model, sparsifier = tiny.model(), tiny.sparsifier()
    with pytest.raises(ValueError, match="training pass first"):
        sparsifier.ratio_loss()
    sparsifier.attach(model)
    model(**tiny.row(4))
    with pytest.raises(ValueError, match="training pass first"):
        sparsifier.ratio_loss()


@pytest.mark.parametrize("training", [True, False])
def test_packed_turns_equal_each_turn_alone(training: bool) -> None:
    """Two turns share a picture in one row and do not see each other: a 4-D mask and own positions."""
    model, _ = training_pair(text_policy="random", image_policy="uniform", min_answer_length=1)
    model.train(training)
    turns = [tiny.row(6, 1, 0), tiny.row(9, 1, 0)]
    turns[1]["pixel_values"] = turns[0]["pixel_values"]
    turns[1]["input_ids"][:, 17:] = turns[1]["input_ids"][:, 17:].flip(-1)
    turns[1]["input_ids"][:, :17] = turns[0]["input_ids"][:, :17]
    prefix, ends = 17, [23, 32]
    ids = torch.cat([turns[0]["input_ids"], turns[1]["input_ids"][:, prefix:]], dim=1)
    segment = torch.tensor([0] * prefix + [1] * 6 + [2] * 9)
    visible = (segment[:, None] == segment) | (segment == 0)
    visible = (visible & torch.ones(32, 32, dtype=torch.bool).tril())[None, None]
    positions = torch.tensor([[*range(23), *range(prefix, 26)]])
    answer_mask = torch.zeros(1, 32, dtype=torch.bool)
    answer_mask[:, [20, 21, 22, 28, 29, 30, 31]] = True
    packed = model(
        ids, turns[0]["pixel_values"], attention_mask=visible, position_ids=positions, answer_mask=answer_mask
    ).logits[0]
    for turn, start, end in zip(turns, (prefix, 23), ends, strict=True):
        columns = [*range(prefix), *range(start, end)]
        alone = model(**turn, answer_mask=answer_mask[:, columns]).logits[0]
        torch.testing.assert_close(alone, packed[columns], atol=1e-5, rtol=1e-4)


def test_gradient_checkpointing_changes_nothing() -> None:
    gradients = []
    for checkpointing in (False, True):
        model, _ = training_pair(min_answer_length=1)
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        inputs = tiny.batch([tiny.row(14, 1, 0)])
        torch.manual_seed(7)
        model(**inputs, labels=inputs["input_ids"], answer_mask=last_columns(inputs, 10)).loss.backward()
        gradients.append(
            [p.grad for p in model.model.language_model.parameters()]
            + [p.grad for p in model.sparsifier.parameters()]
        )
    for plain, checkpointed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, checkpointed, atol=1e-6, rtol=1e-4)


def test_padding_on_either_side_changes_nothing() -> None:
    model, sparsifier = training_pair(text_policy="uniform", image_policy="uniform", min_answer_length=1)
    row = tiny.row(9, 1, 0)
    answer_mask = last_columns(row, 5)
    alone = model(**row, answer_mask=answer_mask).logits
    for left, right in ((4, 0), (0, 4)):
        padded = {k: torch.nn.functional.pad(row[k], (left, right)) for k in ("input_ids", "attention_mask")}
        mask = torch.nn.functional.pad(answer_mask, (left, right))
        logits = model(**padded, pixel_values=row["pixel_values"], answer_mask=mask).logits
        torch.testing.assert_close(logits[:, left : left + 26], alone, atol=1e-4, rtol=1e-3)
    assert sparsifier.sampled.text_mask_BN.eq(0).any()


def test_autocast_leaves_masks_and_attention_in_float32() -> None:
    losses = []
    for dtype in (torch.float32, torch.bfloat16):
        model, sparsifier = training_pair(min_answer_length=1)
        inputs = tiny.batch([tiny.row(14, 1, 0), tiny.row(14, 1, 1)])
        torch.manual_seed(0)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
            out = model(**inputs, labels=inputs["input_ids"], answer_mask=last_columns(inputs, 10, 10))
            out.loss.backward()
        assert torch.stack(sparsifier.sampled.image_masks).dtype == torch.float32
        assert all(parameter.grad.isfinite().all() for parameter in sparsifier.parameters())
        losses.append(out.loss)
    torch.testing.assert_close(losses[0], losses[1], atol=0.05, rtol=0.02)


@pytest.mark.parametrize("pictures", [0, 1, 2])
def test_masked_training_equals_dropped_inference(pictures: int) -> None:
    """With the same decisions, weighing keys by masks gives the logits of a run that really drops them."""
    model, sparsifier = training_pair(min_answer_length=1, image_policy="uniform")
    sparsifier.noise = torch.ones_like  # without differences in noise, samples are the hard decisions
    row, answer = tiny.row(9, pictures, 3), torch.arange(10, 40)[None]
    prompt = row["input_ids"].shape[1]
    longer = row | {"input_ids": torch.cat([row["input_ids"], answer], dim=1)}
    longer["attention_mask"] = torch.ones_like(longer["input_ids"])
    trained = model(**longer, answer_mask=last_columns(longer, 30)).logits[0]
    kept = sparsifier.sampled.text_mask_BN[0, prompt:-1].bool()
    assert 0 < kept.sum() < 29

    model.eval()
    with torch.no_grad():
        out = model(**row)
        stays = torch.ones(prompt, dtype=torch.bool)
        stays[1 : 1 + 16 * pictures] = False
        stays[1 + sparsifier.report.image_kept[0]] = True
        torch.testing.assert_close(out.logits[0], trained[:prompt][stays], atol=1e-4, rtol=0)
        for column in range(30):
            out = model(input_ids=answer[:, column : column + 1], past_key_values=out.past_key_values)
            torch.testing.assert_close(out.logits[0, 0], trained[prompt + column], atol=1e-4, rtol=0)
    assert torch.equal(sparsifier.report.text_kept[0][:-1], kept)


@pytest.mark.parametrize("case", ["no answer", "no picture", "nothing at all"])
def test_rows_without_answer_or_picture_are_finite(case: str) -> None:
    """They keep everything and pay nothing (for an empty answer the official code gives NaN)."""
    model, sparsifier = training_pair(min_answer_length=1)
    inputs = tiny.row(12, 0 if case == "no picture" else 1, 2)
    answer_mask = last_columns(inputs, 0 if case == "no answer" else 5)
    if case == "nothing at all":
        inputs, answer_mask = tiny.row(12, 0, 2), torch.zeros(1, 13, dtype=torch.bool)
    out = model(**inputs, labels=inputs["input_ids"], answer_mask=answer_mask)
    image_loss, text_loss, prompt_loss = sparsifier.ratio_loss()
    (out.loss + image_loss + text_loss + prompt_loss).backward()
    assert out.loss.isfinite()
    assert all(p.grad is None or p.grad.isfinite().all() for p in sparsifier.parameters())
    assert (text_loss == 0) == (case != "no picture")
    assert prompt_loss == 0
