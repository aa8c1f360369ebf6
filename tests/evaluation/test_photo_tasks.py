"""Captions, short answers about photographs, and long answers: scores, examples, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image
from transformers import LlavaForConditionalGeneration, LlavaProcessor

from dynamic_llava.evaluation import evaluate, long_answers, table, tasks, without_examples
from dynamic_llava.evaluation.batches import encode_questions
from dynamic_llava.evaluation.references import sentences
from dynamic_llava.evaluation.wups import Wups, parts

SAID = [
    ["A dog runs on grass.", "A brown dog runs.", "The dog is outside."],
    ["Two men sit on a bench.", "Men on a bench.", "Two people are sitting."],
    ["A girl jumps into a pool.", "A child in the water.", "The girl jumps."],
]


@pytest.fixture
def captions(tmp_path: Path) -> Path:
    lines = []
    for number, its in enumerate(SAID):
        Image.new("RGB", (32, 32), ("red", "green", "blue")[number]).save(tmp_path / f"{number}.png")
        lines.append({"image": f"{number}.png", "split": "test", "captions": its})
    path = tmp_path / "captions.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)))
    return path


@pytest.fixture
def pairs(captions: Path) -> Path:
    lines = [
        {"image": f"{number}.png", "split": "test", "question": "what is there ?", "answer": answer}
        for number, answer in enumerate(("dog", "man, bench", "2"))
    ]
    path = captions.with_name("qa.jsonl")
    path.write_text("\n".join(map(json.dumps, lines)))
    return path


def test_scores_of_a_reference_and_of_nonsense() -> None:
    pytest.importorskip("pycocoevalcap", reason="pycocoevalcap is not installed")
    from dynamic_llava.evaluation.scorers import Scorers

    scorers = Scorers()
    answers = [its[0] for its in SAID]
    assert scorers.bleu(answers, SAID) == {"bleu_1": 100.0, "bleu_4": 100.0}
    scores = scorers([*answers[:2], "zebra"], SAID)
    assert scores["rouge_l"] == pytest.approx([1.0, 1.0, 0.0])
    assert scores["cider"][2] == 0.0
    assert min(scores["cider"][:2]) > 1.0
    assert scores["meteor"][0] > 0.99


def test_case_and_punctuation_do_not_count() -> None:
    pytest.importorskip("pycocoevalcap", reason="pycocoevalcap is not installed")
    from dynamic_llava.evaluation.scorers import Scorers

    scorers = Scorers()
    plain = scorers.cider([its[0] for its in SAID], SAID)
    other = [its[0].upper().replace(".", " !") for its in SAID]
    assert scorers.cider(other, SAID) == pytest.approx(plain)


@pytest.mark.parametrize(
    ("answer", "expected"),
    [("Garbage bin.", ["garbage bin"]), ("table,  chair", ["table", "chair"]), ("", []), (",", [])],
)
def test_parts_of_a_list(answer: str, expected: list[str]) -> None:
    assert parts(answer) == expected


@pytest.mark.parametrize(
    ("answer", "reference", "threshold", "expected"),
    [
        ("Dog.", "dog", 0.9, 1.0),
        ("unheard-of", "dog", 0.0, 0.0),
        ("", "dog", 0.0, 0.0),
        ("dog", "cat", 0.0, 24 / 28),  # both 13 deep, carnivore, where they meet, is 12: 2 x 12 / (14 + 14)
        ("dog", "cat", 0.9, 0.1 * 24 / 28),
        ("dog, cat", "cat", 0.0, 24 / 28),  # the dog too many counts as near as it is
        ("chair, table", "table, chair", 0.9, 1.0),
    ],
)
def test_wups(answer: str, reference: str, threshold: float, expected: float) -> None:
    pytest.importorskip("wn", reason="wn is not installed")
    assert Wups(threshold)(answer, reference) == pytest.approx(expected, abs=1e-3)


def test_flickr8k(model: LlavaForConditionalGeneration, processor: LlavaProcessor, captions: Path) -> None:
    pytest.importorskip("pycocoevalcap", reason="pycocoevalcap is not installed")
    result = evaluate(model, processor, "flickr8k", data=captions, max_new_tokens=3, batch_size=2)
    numbers = result["numbers"]
    assert {"bleu_1", "bleu_4", "meteor", "rouge_l", "cider"} < numbers.keys()
    first = numbers["examples"][0]
    assert (first["image"], first["references"]) == ("0.png", SAID[0])
    assert {"answer", "meteor", "rouge_l", "cider"} < first.keys()
    assert "examples" not in without_examples(result)["numbers"]
    assert table(numbers).row_count == 5


def test_daquar(model: LlavaForConditionalGeneration, processor: LlavaProcessor, pairs: Path) -> None:
    pytest.importorskip("wn", reason="wn is not installed")
    numbers = evaluate(model, processor, "daquar", data=pairs, max_new_tokens=2)["numbers"]
    assert numbers["total"] == 3
    assert [example["reference"] for example in numbers["examples"]] == ["dog", "man, bench", "2"]
    assert 0 <= numbers["wups_0.9"] <= numbers["wups_0.0"] <= 100
    assert table(numbers).row_count == 3


@pytest.mark.parametrize("task", ["long-answers", "generation"])
def test_long_answers_measures_time_and_memory_in_the_same_run(
    task: str, model: LlavaForConditionalGeneration, processor: LlavaProcessor, captions: Path
) -> None:
    result = evaluate(model, processor, task, data=captions, max_new_tokens=6, batch_size=2)
    assert result["task"] == "long-answers"
    for numbers in result["numbers"].values():
        assert numbers["prefill_ms"] > 0
        assert numbers["token_ms"] > 0
        assert numbers["kv_bytes_allocated"] > 0
        assert len(numbers["examples"]) == 3
        assert {example["image"] for example in numbers["examples"]} == {"0.png", "1.png", "2.png"}
    assert result["numbers"].keys() == {"dense", "sparse"}
    assert table(result["numbers"]).row_count > 10


def test_the_tower_is_part_of_the_prefill(
    model: LlavaForConditionalGeneration,
    processor: LlavaProcessor,
    captions: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = [0.0]
    monkeypatch.setattr(long_answers.time, "perf_counter", lambda: now[0])

    def wait(*_: object) -> None:
        now[0] += 5.0

    timed = long_answers.Timed()
    with model.model.vision_tower.register_forward_hook(wait):
        timed(model, encode_questions(processor, long_answers.questions(captions, None)[:1]), 3)
    assert [clock.prefill for clock in timed.clocks] == [5.0]
    assert timed.clocks[0].per_token == [0.0, 0.0]


def test_a_description_is_asked_for_with_all_captions_as_its_reference(captions: Path) -> None:
    first, *_ = long_answers.questions(captions, None)
    assert first.answer == " ".join(SAID[0])
    assert first.references == tuple(SAID[0])


@pytest.mark.parametrize(
    ("text", "expected"),
    [("a b c d e", 0.0), ("a b c d a b c d", 1 / 5), ("go go go go go go", 2 / 3), ("", 0.0), ("a b", 0.0)],
)
def test_repetition(text: str, expected: float) -> None:
    asked = tasks.Question(lambda: Image.new("RGB", (8, 8)), "Why?", "No.", "long", references=("No.",))
    assert long_answers.said([text], [asked])["repetition"] == pytest.approx(100 * expected, abs=1e-3)


def test_sentences() -> None:
    assert sentences(" One. Two! Is it 3.5? ") == ["One.", "Two!", "Is it 3.5?"]


@pytest.mark.parametrize("task", ["flickr8k", "daquar", "long-answers"])
def test_a_task_without_its_file_says_what_to_give(
    task: str, model: LlavaForConditionalGeneration, processor: LlavaProcessor
) -> None:
    with pytest.raises(ValueError, match=f"task {task} needs --data"):
        evaluate(model, processor, task)


def test_images_belong_to_long_answers(
    model: LlavaForConditionalGeneration, processor: LlavaProcessor, captions: Path
) -> None:
    with pytest.raises(ValueError, match="--images goes with long-answers; the pictures of flickr8k lie"):
        evaluate(model, processor, "flickr8k", data=captions, images=captions.parent)
