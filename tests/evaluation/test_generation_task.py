"""The generation task: METEOR, references from files, costs by hand, and what is refused."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from PIL import Image
from tests.command_line import Command
from transformers import LlavaForConditionalGeneration, LlavaProcessor

from dynamic_llava.chat import asking
from dynamic_llava.chat.prompt import chat_answer, chat_prompt
from dynamic_llava.costs import flops
from dynamic_llava.costs.rows import Row
from dynamic_llava.costs.shape import DecoderShape
from dynamic_llava.evaluation import evaluate, without_examples
from dynamic_llava.evaluation.batches import Kept, answer
from dynamic_llava.evaluation.descriptions import mean_costs_of
from dynamic_llava.evaluation.meteor import Meteor
from dynamic_llava.evaluation.references import references

PLAIN = [
    {"image": f"{color}.png", "question": "Describe the picture.", "answer": f"A {color} square. No more."}
    for color in ("red", "green", "blue")
]
ROUNDS = {
    "id": "lvis-7",
    "image": "red.png",
    "conversations": [
        {"from": "human", "value": "<image>\nWhat is shown?"},
        {"from": "gpt", "value": "A square."},
        {"from": "human", "value": "What color is it?"},
        {"from": "gpt", "value": "It is red."},
    ],
}


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    folder = tmp_path / "pictures"
    folder.mkdir()
    for color in ("red", "green", "blue"):
        Image.new("RGB", (32, 32), color).save(folder / f"{color}.png")
    return folder


def lines(path: Path, *samples: object) -> Path:
    path.write_text("\n".join(json.dumps(sample) for sample in samples), encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("said", "reference", "expected"),
    [
        ("A cat sat on my mat.", "a cat sat on my mat.", 1 - 0.5 / 7**3),  # one chunk of seven
        ("zebra", "a cat sat", 0.0),
        ("", "a cat sat", 0.0),
        # precision 1, recall 3/6, one chunk of three
        ("a cat sat", "a cat sat on my mat", 0.5 / (0.9 + 0.1 * 0.5) * (1 - 0.5 / 3**3)),
        ("cats", "cat", 0.5),  # the same stem; a single word is all penalty
    ],
)
def test_meteor(said: str, reference: str, expected: float) -> None:
    assert Meteor()(said, reference) == pytest.approx(expected, abs=1e-6)


def test_meteor_parts_every_sentence_end() -> None:
    assert Meteor().tokens("It's Red. Really!") == ["it", "'s", "red", ".", "really", "!"]


def test_layouts(pictures: Path, tmp_path: Path) -> None:
    plain = references(lines(tmp_path / "a.jsonl", *PLAIN), pictures)
    assert [question.answer for question in plain] == [sample["answer"] for sample in PLAIN]
    assert plain[2].open_image().getpixel((0, 0)) == (0, 0, 255)
    (tmp_path / "b.json").write_text(json.dumps([ROUNDS]))
    first, second = references(tmp_path / "b.json", pictures)
    assert (first.answer, first.earlier) == ("A square.", ())
    assert (second.text, second.answer) == ("What color is it?", "It is red.")
    assert second.earlier == (("<image>\nWhat is shown?", "A square."),)


def test_earlier_turns_are_context(processor: LlavaProcessor) -> None:
    earlier = (("<image>\nWhat is shown?", "A square."),)
    prompt = chat_prompt(processor, "What color is it?", 1, earlier)
    assert prompt.count("<image>") == 1
    places = [prompt.index(text) for text in ("<image>", "What is shown?", "A square.", "What color")]
    assert places == sorted(places)
    assert "It is red." in chat_answer(processor, "What color is it?", 1, "It is red.", earlier)


def test_dense_perplexity(
    model: LlavaForConditionalGeneration, processor: LlavaProcessor, pictures: Path, tmp_path: Path
) -> None:
    path = lines(tmp_path / "a.jsonl", *PLAIN, ROUNDS)
    model.sparsifier.detach()
    expected = []
    for question in references(path, pictures):
        prompt = chat_prompt(processor, question.text, 1, question.earlier)
        said = chat_answer(processor, question.text, 1, question.answer, question.earlier)
        tokens = processor.tokenizer(said, add_special_tokens=False)["input_ids"]
        inputs = asking.encode(processor, [prompt + said], [question.open_image()])
        with torch.inference_mode():
            chances = model(**inputs).logits[0, -len(tokens) - 1 : -1].double().log_softmax(-1)
        losses = [-chances[place, token].item() for place, token in enumerate(tokens)]
        expected.append(math.exp(sum(losses) / len(losses)))
    result = evaluate(
        model, processor, "generation", data=path, images=pictures, batch_size=2, max_new_tokens=5
    )
    assert result["questions"] == len(expected) == 5
    assert result["numbers"].keys() == {"dense"}
    assert result["numbers"]["dense"]["perplexity"] == pytest.approx(sum(expected) / 5, rel=1e-4)


def test_costs_equal_the_report(
    model: LlavaForConditionalGeneration, processor: LlavaProcessor, pictures: Path, tmp_path: Path
) -> None:
    (question, *_) = references(lines(tmp_path / "a.jsonl", *PLAIN), pictures)
    kept = Kept()
    answer(model, processor, [question], kept, max_new_tokens=40)
    summary = model.sparsifier.report.summary()
    sparse = mean_costs_of(model, kept.rows)
    assert 0 < summary["output_tokens_kept"] < summary["output_tokens"]
    assert sparse["kv_bytes"] == summary["kv_bytes"]
    assert sparse["decode_tflops"] == pytest.approx(summary["decode_flops"] / 1e12, abs=1e-9)
    shape = DecoderShape.from_config(model.config.text_config)
    counted = flops.paper_flops(shape, summary["output_tokens"], summary["output_tokens_kept"], 1)
    assert sparse["decode_tflops_paper"] == pytest.approx(counted / 1e12, abs=1e-9)
    with asking.dense(model):
        (row,) = kept.rows
        dense = Row(row.prompt, row.prompt, torch.ones_like(row.kept_T))
        assert mean_costs_of(model, [dense])["kv_bytes"] == summary["kv_bytes_dense"]


def test_command(command: Command, checkpoint: Path, pictures: Path, tmp_path: Path) -> None:
    path = lines(tmp_path / "a.jsonl", *PLAIN, ROUNDS)
    ask = ("evaluate", "--task", "generation", "--data", path, "--images", pictures, "--model", checkpoint)
    outcome = command(*ask, "--max-new-tokens", 30, "--output", tmp_path / "out.json", "--json")
    assert outcome.code == 0, outcome.stderr
    result = outcome.json()
    written = json.loads((tmp_path / "out.json").read_text())
    assert without_examples(written) == result
    assert all(len(numbers["examples"]) == 5 for numbers in written["numbers"].values())
    dense, sparse = result["numbers"]["dense"], result["numbers"]["sparse"]
    assert sparse["image_tokens_kept"] < dense["image_tokens_kept"] == 1
    assert dense["meteor_matching"] in ("exact, stem", "exact, stem, synonym")
    for key, cost in sparse["teacher_forced_costs"].items():
        assert 0 < cost <= dense["teacher_forced_costs"][key], key
    assert 0 < dense["mean_answer_tokens"] <= 30
    assert command(*ask, "--dense", "--limit", 1, "--json").json()["numbers"].keys() == {"dense"}


@pytest.mark.parametrize(
    ("sample", "message"),
    [
        ({"question_id": 3, "image": "red.png", "text": "Why?"}, "sample 3: a reference answer is missing"),
        (PLAIN[0] | {"id": "x9", "image": "gone.png"}, "sample x9: "),
        (PLAIN[0] | {"image": "gone.png"}, "gone.png: no such picture; check the path, and --images"),
        (PLAIN[0] | {"image": "."}, "is not a file but a folder"),
        (PLAIN[0] | {"image": "a\0b"}, "embedded null byte"),
        (PLAIN[0] | {"image": "n" * 300}, "File name too long"),
        (PLAIN[0] | {"image": [None]}, "sample 1: 'image' must be the name of one picture"),
        (PLAIN[0] | {"answer": None}, "turn 1 has an empty question or answer"),
        (PLAIN[0] | {"question": ["What?"]}, "turn 1 has an empty question or answer"),
        (PLAIN[0] | {"id": "x9", "answer": "\udce9"}, "sample x9: turn 1: the text is not valid Unicode"),
        (PLAIN[0] | {"id": "x9", "question": "what " * 2000}, "sample x9: "),
        (PLAIN[0] | {"id": "x9", "answer": "what " * 2000}, "too many for the model's 2,048 positions"),
        ({"image": "red.png"}, "sample 1: unknown layout"),
        ({**PLAIN[0], "image": ["red.png", "blue.png"]}, "sample 1: 'image' must be the name of one picture"),
        ({**PLAIN[0], "answer": " "}, "turn 1 has an empty question or answer"),
        (
            {**ROUNDS, "conversations": ROUNDS["conversations"][:3]},
            "sample lvis-7: questions and answers do",
        ),
        ({**PLAIN[0], "question": "<image><image> Which?"}, "one <image> too many"),
        (7, "neither a JSON list nor JSON lines of objects"),
        ([7], "sample 1: is no object"),
    ],
)
def test_refused_samples(
    sample: object, message: str, command: Command, checkpoint: Path, pictures: Path, tmp_path: Path
) -> None:
    path = lines(tmp_path / "a.jsonl", sample)
    ask = ("evaluate", "--task", "generation", "--data", path, "--images", pictures, "--model", checkpoint)
    outcome = command(*ask)
    assert outcome.code == 2
    assert message in outcome.stderr
    assert outcome.stderr.count("error: ") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--task", "generation"), "needs --data"),
        (("--task", "generation", "--data", "gone.jsonl", "--images", "."), "gone.jsonl: no such file"),
        (
            ("--task", "scenes", "--max-new-tokens", 5),
            "go with flickr8k, daquar, long-answers",
        ),
    ],
)
def test_refused_options(
    arguments: tuple[object, ...], message: str, command: Command, checkpoint: Path
) -> None:
    outcome = command("evaluate", "--model", checkpoint, *arguments)
    assert outcome.code == 2
    assert message in outcome.stderr


@pytest.mark.parametrize(
    ("text", "message"),
    [("{broken", "line 1: not JSON"), ("", "it is empty"), ("[]", "no sample"), ("[broken", "after byte")],
)
def test_broken_files(text: str, message: str, pictures: Path, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        references(path, pictures)
