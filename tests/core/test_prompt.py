"""Dropping prompt tokens: which may go, that rows do not disturb each other, that modes agree."""

from __future__ import annotations

import pytest
import torch
from tests import tiny

from dynamic_llava import Sparsifier
from dynamic_llava.core.cache import context_of
from dynamic_llava.core.question import question_mask

MARKER = (7, 9)


def pair(**settings: object) -> tuple[object, Sparsifier]:
    model = tiny.model()
    sparsifier = tiny.sparsifier(sparsify_prompt=True, prompt_marker=MARKER, **settings)
    return model, sparsifier.attach(model)


def marked_row(text: int, seed: int, at: int | None) -> dict[str, torch.Tensor]:
    """A row whose question begins ``at`` tokens after the picture, or nowhere."""
    row = tiny.row(text, 1, seed)
    words = row["input_ids"][0, 1 + tiny.IMAGE_TOKENS :]
    words[words == MARKER[0]] = 8
    if at is not None:
        words[at : at + 2] = torch.tensor(MARKER)
    return row


def test_question_begins_with_the_last_marker_after_the_pictures() -> None:
    ids = torch.tensor([[7, 9, 3, 3, 7, 9, 5, 7, 9, 6, 4], [0, 0, 7, 9, 3, 3, 5, 5, 7, 6, 4]])
    valid = torch.ones_like(ids, dtype=torch.bool)
    positions = torch.tensor([[2, 3], [11 + 4, 11 + 5]])
    mask = question_mask(ids, list(positions), valid, MARKER)
    assert mask[0].nonzero()[:, 0].tolist() == [7, 8, 9]  # all but the last token of the row
    assert mask[1].nonzero()[:, 0].tolist() == [6, 7, 8, 9]  # no marker after the picture
    assert not question_mask(ids, [], valid, MARKER).any()
    valid[0, 8:] = False  # what follows belongs to the answer: the marker there is none
    assert question_mask(ids, list(positions), valid, MARKER)[0].nonzero()[:, 0].tolist() == [4, 5, 6]


@torch.no_grad()
def test_rows_of_a_batch_drop_what_they_drop_alone() -> None:
    model, sparsifier = pair()
    rows = [marked_row(19, 1, 4), marked_row(30, 2, None), marked_row(8, 3, 0), tiny.row(12, 0, 4)]
    tokens, kept = [], []
    for row in rows:
        tokens.append(model.generate(**row, max_new_tokens=24, do_sample=False)[0, -24:])
        kept.append(sparsifier.report.prompt_kept[0].tolist())
    assert [len(decisions) for decisions in kept] == [14, 29, 7, 0]
    assert 0 < sum(map(sum, kept)) < 50
    batch = model.generate(**tiny.batch(rows), max_new_tokens=24, do_sample=False)[:, -24:]
    assert torch.equal(batch, torch.stack(tokens))
    assert [decisions.tolist() for decisions in sparsifier.report.prompt_kept] == kept
    images = [4, 4, 4, 0]
    held = [1 + images[i] + len(row["input_ids"][0]) - 1 - 16 * (i < 3) for i, row in enumerate(rows)]
    held = [n - len(k) + sum(k) for n, k in zip(held, kept, strict=True)]
    fed = [int(decisions.sum()) for decisions in sparsifier.report.text_kept]
    assert sparsifier.report.kv_lengths[-1].tolist() == [a + b for a, b in zip(held, fed, strict=True)]


@torch.no_grad()
def test_decode_without_cache_equals_cached() -> None:
    model, sparsifier = pair()
    inputs = tiny.batch([marked_row(19, 1, 4), marked_row(30, 2, None)])
    runs = []
    for use_cache in (True, False):
        out = model.generate(**inputs, max_new_tokens=24, do_sample=False, use_cache=use_cache)
        runs.append((out, [kept.tolist() for kept in sparsifier.report.prompt_kept]))
    assert torch.equal(runs[0][0], runs[1][0])
    assert runs[0][1] == runs[1][1]


@torch.no_grad()
def test_dropped_tokens_of_a_new_turn_take_part_once() -> None:
    """They see and are seen in their own call, and are gone in the next one."""
    model, sparsifier = pair(sparsify_text=False, seed=5)
    first = model(**marked_row(9, 1, None))
    turn = torch.randint(10, tiny.VOCABULARY, (1, 12), generator=torch.Generator().manual_seed(5))
    before = sparsifier.report.kv_lengths[-1, 0].item()
    second = model(input_ids=turn, past_key_values=first.past_key_values)
    decisions = sparsifier.report.prompt_kept[0][-11:]
    assert 0 < decisions.sum() < 11
    assert second.logits.shape[1] == 12
    assert sparsifier.report.kv_lengths[-1, 0].item() == before + int(decisions.sum()) + 1

    last = model(input_ids=turn[:, :1], past_key_values=second.past_key_values).logits
    reference, plain = pair(sparsify_text=False, seed=5)
    past = reference(**marked_row(9, 1, None)).past_key_values
    plain.config.sparsify_prompt = False
    past = reference(input_ids=turn, past_key_values=past).past_key_values
    slots = context_of(past).slots
    slots.valid_BS[0, before : before + 11] &= decisions
    slots.is_full = False  # the slots of the dropped ones are no longer seen
    expected = reference(input_ids=turn[:, :1], past_key_values=past).logits
    torch.testing.assert_close(last, expected, atol=1e-5, rtol=0)


def test_masked_pass_equals_the_cached_one() -> None:
    """Hard decisions at full length give the logits of really dropping, at the tokens that stay."""
    model, sparsifier = pair()
    row = marked_row(19, 1, 4)
    with torch.no_grad():
        dropped = model(**row)
        kept = sparsifier.report.prompt_kept[0]
        length = row["input_ids"].shape[1]
        prompt_mask = torch.zeros(1, length, dtype=torch.bool)
        prompt_mask[:, 1 + 16 + 4 : -1] = True
        answer_mask = torch.zeros_like(prompt_mask)
        masked = model(**row, answer_mask=answer_mask, prompt_mask=prompt_mask)
    stays = torch.ones(length, dtype=torch.bool)
    stays[prompt_mask[0]] = kept
    image = torch.zeros(16, dtype=torch.bool)
    image[sparsifier.report.image_kept[0]] = True
    stays[1:17] = image
    torch.testing.assert_close(masked.logits[0, stays], dropped.logits[0], atol=1e-4, rtol=0)


def test_training_needs_to_know_the_prompt_tokens_and_pays_for_them() -> None:
    model, sparsifier = pair(min_prompt_length=5)
    model.train()
    row = marked_row(19, 1, 4)
    answer_mask = torch.zeros_like(row["input_ids"], dtype=torch.bool)
    with pytest.raises(ValueError, match="prompt_mask"):
        model(**row, answer_mask=answer_mask)
    prompt_mask = answer_mask.clone()
    prompt_mask[:, 20:30] = True
    out = model(**row, labels=row["input_ids"], answer_mask=answer_mask, prompt_mask=prompt_mask)
    kept = sparsifier.sampled.prompt_mask_BN[prompt_mask]
    assert set(kept.tolist()) == {0.0, 1.0}
    _, _, prompt_loss = sparsifier.ratio_loss()
    torch.testing.assert_close(prompt_loss, (0.7 - kept.mean()) ** 2)
    (out.loss + prompt_loss).backward()
    assert all(parameter.grad.abs().max() > 0 for parameter in sparsifier.prompt_predictor.parameters())


def test_switching_it_on_later_needs_a_predictor() -> None:
    model, sparsifier = tiny.model(), tiny.sparsifier()
    sparsifier.attach(model)
    sparsifier.config.sparsify_prompt = True
    with pytest.raises(ValueError, match="sparsify_prompt is True, but this sparsifier was made without it"):
        model(**tiny.row(9))
    sparsifier.config.text_policy = "uniform"
    model(**tiny.row(9))
    assert sparsifier.report.prompt_kept[0].sum() == 5  # int(8 * 0.7)
