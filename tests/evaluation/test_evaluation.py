"""Evaluation: numbers equal what a plain computation gives, and intervals what R gives."""

from __future__ import annotations

import pytest
import torch
from transformers import LlavaForConditionalGeneration, LlavaProcessor

from dynamic_llava.chat.asking import encode
from dynamic_llava.chat.prompt import chat_answer, chat_prompt
from dynamic_llava.evaluation import accuracy, descriptions, evaluate, intervals, scoring, tasks
from dynamic_llava.evaluation.batches import Kept, answer


def stepwise_loss(
    model: LlavaForConditionalGeneration, processor: LlavaProcessor, question: tasks.Question
) -> tuple[float, int]:
    """Feed the reference token by token with a cache; return its summed loss and its length."""
    prompt = chat_prompt(processor, question.text, 1)
    continuation = chat_answer(processor, question.text, 1, question.answer)
    tokens = processor.tokenizer(continuation, add_special_tokens=False)["input_ids"]
    inputs = encode(processor, [prompt], [question.open_image()])
    length = inputs["input_ids"].shape[1]
    loss = 0.0
    with torch.inference_mode():
        output = model(**inputs, use_cache=True)
        for step, token in enumerate(tokens):
            loss -= output.logits[0, -1].double().log_softmax(dim=-1)[token].item()
            output = model(
                input_ids=torch.tensor([[token]]),
                attention_mask=torch.ones(1, length + step + 1, dtype=torch.long),
                past_key_values=output.past_key_values,
                use_cache=True,
            )
    return loss, len(tokens)


@pytest.mark.parametrize("dense", [False, True])
def test_teacher_forced_loss_equals_token_by_token(
    dense: bool, model: LlavaForConditionalGeneration, processor: LlavaProcessor
) -> None:
    asked = sorted(tasks.scene_descriptions(3), key=lambda question: len(question.answer))
    if dense:
        model.sparsifier.detach()
    kept = Kept()
    loss_B, length_B = scoring.score(model, processor, asked, kept)
    for question, loss, length in zip(asked, loss_B.tolist(), length_B.tolist(), strict=True):
        expected_loss, expected_length = stepwise_loss(model, processor, question)
        assert length == expected_length
        assert loss == pytest.approx(expected_loss, rel=1e-4)
    assert kept.output == int(length_B.sum()) - 3  # an answer's last token is never fed back
    assert kept.image == 3 * 144
    if dense:
        assert kept.shares() == {"image_tokens_kept": 1.0, "output_tokens_kept": 1.0}
    else:
        assert kept.image_kept == 3 * 28
        assert 0.05 < kept.shares()["output_tokens_kept"] < 0.95


@pytest.mark.parametrize("policy", ["uniform", "streaming", "h2o", "tova"])
def test_fixed_policies_score_as_they_decode(
    policy: str, model: LlavaForConditionalGeneration, processor: LlavaProcessor
) -> None:
    asked = sorted(tasks.scene_descriptions(3), key=lambda question: len(question.answer))
    kept = Kept()
    with descriptions.configured(model, {"text_policy": policy, "text_keep_rate": 0.4}):
        loss_B, length_B = scoring.score(model, processor, asked, kept)
        expected = [stepwise_loss(model, processor, question)[0] for question in asked]
    assert loss_B.tolist() == pytest.approx(expected, rel=1e-4)
    assert kept.output == int(length_B.sum()) - 3
    assert kept.shares()["output_tokens_kept"] == pytest.approx(0.4, abs=0.02)
    assert kept.image == 3 * 144


def test_perplexities(model: LlavaForConditionalGeneration, processor: LlavaProcessor) -> None:
    asked = tasks.scene_descriptions(3)
    loss_B, length_B = scoring.score(model, processor, asked, Kept())
    run = descriptions.run_setting(model, processor, asked, 2, descriptions.Setting("image+text"))
    row = descriptions.numbers_of(run, asked)
    assert row["perplexity"] == pytest.approx((loss_B / length_B).exp().mean().item(), rel=1e-4)
    assert row["perplexity_of_all_tokens"] == pytest.approx(
        (loss_B.sum() / length_B.sum()).exp().item(), rel=1e-4
    )
    assert row["reference_tokens"] == int(length_B.sum())


def test_descriptions(model: LlavaForConditionalGeneration, processor: LlavaProcessor) -> None:
    before = model.sparsifier.config
    numbers = evaluate(model, processor, "descriptions", limit=2, seed=5)["numbers"]
    assert numbers.keys() == {"dense", "image", "image+text", "image+uniform", "image+random"}
    assert model.sparsifier.config is before
    share = numbers["image+text"]["teacher_forced"]["output_tokens_kept"]
    assert 0.05 < share < 0.95
    assert numbers["dense"]["teacher_forced"] == {"image_tokens_kept": 1.0, "output_tokens_kept": 1.0}
    assert numbers["image"]["teacher_forced"]["output_tokens_kept"] == 1.0
    assert numbers["image"]["image_tokens_kept"] == pytest.approx(28 / 144, abs=1e-4)
    assert numbers["image+uniform"]["teacher_forced"]["output_tokens_kept"] == pytest.approx(share, abs=0.02)
    random = numbers["image+random"]
    assert random["seeds"] == [5, 6, 7]
    assert len({run["perplexity"] for run in random["runs"]}) == 3
    for run in random["runs"]:
        assert run["teacher_forced"]["output_tokens_kept"] == pytest.approx(share, abs=0.12)
    mean = sum(run["perplexity"] for run in random["runs"]) / 3
    assert random["perplexity"] == pytest.approx(mean, abs=1e-3)
    assert (
        len({numbers[name]["perplexity"] for name in ("dense", "image", "image+text", "image+uniform")}) == 4
    )


def test_dense_descriptions_have_one_row(
    model: LlavaForConditionalGeneration, processor: LlavaProcessor
) -> None:
    model.sparsifier.detach()
    result = evaluate(model, processor, "descriptions", limit=1)
    assert result["numbers"].keys() == {"dense"}
    assert result["sparsity"] is None


def test_accuracy_counts_right_answers(
    model: LlavaForConditionalGeneration, processor: LlavaProcessor
) -> None:
    asked = tasks.questions("easy-vqa", 6)
    said = answer(model, processor, asked, Kept())
    taught = [  # half of the references become what the model says, but for case and a full stop
        tasks.Question(
            question.open_image, question.text, f" {text.upper()}. " if number % 2 else "never", "kind"
        )
        for number, (question, text) in enumerate(zip(asked, said, strict=True))
    ]
    longest = max(len(processor.tokenizer(text)["input_ids"]) for text in said)
    assert longest > 1
    numbers = accuracy.measure(model, processor, taught, batch_size=6)
    assert (numbers["right"], numbers["total"]) == _right(model, processor, taught)
    assert numbers["kinds"]["kind"]["total"] == 6


def _right(
    model: LlavaForConditionalGeneration, processor: LlavaProcessor, asked: list[tasks.Question]
) -> tuple[int, int]:
    said = answer(model, processor, asked, Kept())
    pairs = zip(said, asked, strict=True)
    return sum(text.lower() == question.answer.strip(" .").lower() for text, question in pairs), len(asked)


def test_batches_do_not_change_answers(
    model: LlavaForConditionalGeneration, processor: LlavaProcessor
) -> None:
    asked = tasks.questions("scenes", 5)
    alone = [answer(model, processor, [question], Kept())[0] for question in asked]
    together = answer(model, processor, asked, Kept())
    # A longer reference in the batch lets every row speak longer.
    assert all(text.startswith(first) for text, first in zip(together, alone, strict=True))


@pytest.mark.parametrize(
    ("text", "expected"), [(" Yes. ", "yes"), ("Middle Right", "middle right"), ("no.", "no"), ("", "")]
)
def test_normalised_answer(text: str, expected: str) -> None:
    assert accuracy.normalised(text) == expected


def test_all_easy_vqa_questions() -> None:
    asked = tasks.easy_vqa_test()
    assert len(asked) == 9673
    assert asked[0].open_image().size == (64, 64)


def test_held_out_scenes_are_split_by_kind() -> None:
    short, long = tasks.scene_questions(20), tasks.scene_descriptions(20)
    assert len(long) == 20
    assert {question.kind for question in long} == {"description"}
    assert {"count", "color", "shape", "size", "position", "relation", "exists"} <= {
        question.kind for question in short
    }


def test_unknown_task(model: LlavaForConditionalGeneration, processor: LlavaProcessor) -> None:
    with pytest.raises(ValueError, match="unknown task 'riddles'; choose one of easy-vqa"):
        evaluate(model, processor, "riddles")


@pytest.mark.parametrize(
    ("right", "total", "interval"),  # R: prop.test(right, total, correct = FALSE)
    [
        (0, 10, (0.0, 0.27753)),
        (5, 10, (0.23659, 0.76341)),
        (10, 10, (0.72247, 1.0)),
        (95, 100, (0.88825, 0.97846)),
    ],
)
def test_wilson_interval(right: int, total: int, interval: tuple[float, float]) -> None:
    assert intervals.wilson(right, total) == pytest.approx(interval, abs=1e-4)


@pytest.mark.parametrize(("right", "total"), [(0, 0), (3, 2), (-1, 2)])
def test_impossible_counts(right: int, total: int) -> None:
    with pytest.raises(ValueError, match=f"{right} right answers of {total}"):
        intervals.wilson(right, total)
