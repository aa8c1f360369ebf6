"""Photographs as training data: packed trees, cached features, a stream that is a function of the step."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from PIL import Image
from transformers import LlavaForConditionalGeneration, LlavaProcessor

import dynamic_llava
from dynamic_llava.chat.prompt import chat_answer, chat_prompt
from dynamic_llava.data import photographs
from dynamic_llava.data.training import IGNORE, model_inputs
from dynamic_llava.training.photo import features as room
from dynamic_llava.training.photo.packing import Asked, Shown, TreePacker
from dynamic_llava.training.photo.stream import PhotoStream
from dynamic_llava.training.recipe import Photographs
from dynamic_llava.training.run import dry_run, train

TOKENS = 36
COLORS = ("red", "green", "blue", "black", "white", "gray")


@pytest.fixture(scope="module")
def checkpoint(small_checkpoint: Path) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    return dynamic_llava.load(small_checkpoint)


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Six training pictures and two of each other split, with captions, questions and conversations."""
    folder = tmp_path / "photos"
    (folder / "images").mkdir(parents=True)
    captions, questions = [], []
    for number, color in enumerate((*COLORS, "red", "blue", "green", "black")):
        split = "train" if number < 6 else ("val", "test")[number % 2]
        name = f"images/{number}.png"
        picture = Image.new("RGB", (20, 30), color)
        picture.paste("yellow", (0, 0, 10, 30))
        picture.save(folder / name)
        its = [f"A {color} wall .", f"a wall , painted {color}", f"{color} and yellow"]
        captions.append({"image": name, "split": split, "captions": its})
        pair = {"question": "what colour is the wall ?", "answer": f"{color}, yellow"}
        questions.append({"image": name, "split": split, **pair})
    turns = [{"from": "human", "value": "Hello?"}, {"from": "gpt", "value": "Good morning."}]
    for file, lines in (
        ("captions", captions),
        ("questions", questions),
        ("texts", [{"conversations": turns}]),
    ):
        (folder / f"{file}.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return folder


def settings(folder: Path, **changes: Any) -> Photographs:
    given = {
        "captions": folder / "captions.jsonl",
        "questions": folder / "questions.jsonl",
        "texts": folder / "texts.jsonl",
        "features": folder / "features",
        "image_tokens": 9,
        "captions_per_step": 2,
        "descriptions_per_step": 1,
        "questions_per_step": 1,
        "texts_per_step": 1,
    }
    return Photographs(**{**given, **changes})


def test_captions_become_sentences(pictures: Path) -> None:
    first, *_ = photographs.captioned(pictures / "captions.jsonl", "train")
    assert first.captions == ("A red wall.", "A wall, painted red.", "Red and yellow.")
    assert len(photographs.captioned(pictures / "captions.jsonl", "val")) == 2


def test_a_question_asks_for_a_short_answer(pictures: Path) -> None:
    first, *_ = photographs.questioned(pictures / "questions.jsonl", "test")
    assert first.questions == ((f"What colour is the wall?\n{photographs.SHORTLY}", "blue, yellow"),)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({"split": "train"}, "line 1: expected an object with the name of an 'image'"),
        ({"image": "a.png", "split": "train"}, "line 1: 'captions' must be a list of sentences"),
        ({"image": "a.png", "split": "other", "captions": ["A."]}, "holds no line of the split 'train'"),
    ],
)
def test_other_layouts_are_refused(tmp_path: Path, line: dict[str, Any], message: str) -> None:
    path = tmp_path / "captions.jsonl"
    path.write_text(json.dumps(line))
    with pytest.raises(ValueError, match=message):
        photographs.captioned(path, "train")


def packed(processor: LlavaProcessor) -> tuple[list[Shown], dict[str, torch.Tensor]]:
    shown = [
        Shown(
            Path("a.png"),
            False,
            (
                Asked("Describe it.", ("A red wall.", "Red and yellow, I see.")),
                Asked("In detail.", ("A wall.",), long=True),
            ),
        ),
        Shown(None, False, (Asked("Hello?", ("Good morning.",)),)),
    ]
    features = torch.randn(1, TOKENS + 1, 32, generator=torch.Generator().manual_seed(0))
    return shown, TreePacker(processor, TOKENS)(shown, features)


def alone(processor: LlavaProcessor, question: str, answer: str, pictures: int) -> list[int]:
    text = chat_prompt(processor, question, pictures) + chat_answer(processor, question, pictures, answer)
    text = text.replace("<image>", "<image>" * TOKENS)
    ids: list[int] = processor.tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids[: ids.index(processor.tokenizer.eos_token_id) + 1]


def answers(shown: list[Shown]) -> list[tuple[int, str, str]]:
    return [
        (row, asked.question, answer)
        for row, one in enumerate(shown)
        for asked in one.asked
        for answer in asked.answers
    ]


def test_every_answer_reads_as_if_it_stood_alone(
    checkpoint: tuple[LlavaForConditionalGeneration, LlavaProcessor],
) -> None:
    _, processor = checkpoint
    shown, batch = packed(processor)
    rows, ends = (batch["labels"] == processor.tokenizer.eos_token_id).nonzero(as_tuple=True)
    for (row, question, answer), its, end in zip(answers(shown), rows.tolist(), ends.tolist(), strict=True):
        assert its == row
        seen = batch["attention_mask"][row, 0, end].nonzero().flatten()
        expected = alone(processor, question, answer, int(shown[row].path is not None))
        assert batch["input_ids"][row, seen].tolist() == expected
        assert batch["position_ids"][row, seen].tolist() == list(range(len(seen)))


def test_packed_logits_equal_those_of_an_answer_alone(
    checkpoint: tuple[LlavaForConditionalGeneration, LlavaProcessor],
) -> None:
    model, processor = checkpoint
    shown, batch = packed(processor)
    room.give_features(model)
    try:
        with torch.no_grad():
            together = model(**model_inputs(batch)).logits
            _, question, answer = answers(shown)[1]
            ids = torch.tensor([alone(processor, question, answer, 1)])
            single = model(input_ids=ids, pixel_values=batch["pixel_values"]).logits[0]
    finally:
        room.release_tower(model)
    end = (batch["labels"][0] == processor.tokenizer.eos_token_id).nonzero().flatten()[1]
    seen = batch["attention_mask"][0, 0, end].nonzero().flatten()
    torch.testing.assert_close(together[0, seen], single, atol=1e-4, rtol=1e-4)


def test_only_answers_are_labelled_and_only_long_ones_may_be_dropped(
    checkpoint: tuple[LlavaForConditionalGeneration, LlavaProcessor],
) -> None:
    _, processor = checkpoint
    shown, batch = packed(processor)
    labelled = processor.tokenizer.decode(batch["labels"][batch["labels"] != IGNORE])
    end = processor.tokenizer.eos_token
    assert labelled == "".join(f" {answer}{end}" for _, _, answer in answers(shown))
    droppable = processor.tokenizer.decode(batch["input_ids"][batch["answer_mask"]], skip_special_tokens=True)
    assert droppable.strip() == "A wall."


def test_features_are_what_the_tower_says_of_both_views(
    pictures: Path, checkpoint: tuple[LlavaForConditionalGeneration, LlavaProcessor]
) -> None:
    model, processor = checkpoint
    paths = [picture.path for picture in photographs.captioned(pictures / "captions.jsonl", "train")]
    made = room.Features(pictures / "features", [paths[:4], paths[4:]], model, processor)
    found = made([paths[5], paths[1]], [False, True], TOKENS)
    images = [Image.open(paths[5]), Image.open(paths[1]).transpose(Image.Transpose.FLIP_LEFT_RIGHT)]
    pixels = processor.image_processor(images, return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        expected = model.model.vision_tower(pixels, output_hidden_states=True).hidden_states[-1]
    torch.testing.assert_close(found, expected, atol=0.05, rtol=0.05)  # they are kept in 16 bits


def test_features_are_computed_once(
    pictures: Path,
    checkpoint: tuple[LlavaForConditionalGeneration, LlavaProcessor],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, processor = checkpoint
    paths = [picture.path for picture in photographs.captioned(pictures / "captions.jsonl", "train")]
    first = room.Features(pictures / "features", [paths], model, processor)(paths, [False] * 6, 9)
    monkeypatch.setattr(room, "open_image", lambda path: pytest.fail("a picture was opened again"))
    again = room.Features(pictures / "features", [paths], model, processor)(paths, [False] * 6, 9)
    assert torch.equal(first, again)


def test_a_tower_has_one_name_whatever_the_number_of_threads() -> None:
    tower = torch.nn.Linear(1000, 1111)
    with torch.no_grad():  # sizes so different that the order of a sum matters
        tower.weight.copy_(torch.randn(1111, 1000) * 10 ** (4 * torch.randn(1111, 1000)))
    before = torch.get_num_threads()
    names = set()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            names.add(room._digest([Path("a.jpg")], tower))
    finally:
        torch.set_num_threads(before)
    assert len(names) == 1


def test_pooling_averages_neighbours_and_keeps_the_class_token() -> None:
    grid = torch.arange(16.0).reshape(1, 16, 1)
    features = torch.cat([torch.full((1, 1, 1), -1.0), grid], dim=1)
    assert room.pooled(features, 16) is features
    assert room.pooled(features, 4).flatten().tolist() == [-1.0, 2.5, 4.5, 10.5, 12.5]


def test_the_stream_is_a_function_of_the_step(pictures: Path) -> None:
    streams = [PhotoStream(settings(pictures), 0, "train") for _ in range(2)]
    assert streams[0].rows(7) == streams[1].rows(7) != streams[0].rows(8)
    drawn = [row.path for step in range(3) for row in streams[0].rows(step)[:2]]
    assert len(set(drawn)) == 6  # an epoch shows every picture


def test_pictures_whose_text_tells_left_from_right_are_not_mirrored(pictures: Path) -> None:
    path = pictures / "captions.jsonl"
    path.write_text(path.read_text().replace(" and yellow", " to the left of yellow"))
    stream = PhotoStream(settings(pictures, questions_per_step=0), 0, "train")
    assert not any(row.mirrored for step in range(20) for row in stream.rows(step))


def test_no_test_picture_is_ever_drawn(pictures: Path) -> None:
    stream = PhotoStream(settings(pictures), 0, "train")
    tested = {picture.path for picture in photographs.captioned(pictures / "captions.jsonl", "test")}
    assert tested.isdisjoint({row.path for step in range(40) for row in stream.rows(step)})
    assert tested.isdisjoint({path for paths in stream.paths for path in paths})


WriteStage = Callable[..., Path]


@pytest.fixture
def write_stage(tmp_path: Path, pictures: Path, small_checkpoint: Path) -> WriteStage:
    def write(stage: str, init: Path = small_checkpoint, **run: Any) -> Path:
        data = json.loads(settings(pictures).model_dump_json())
        recipe = {
            "stage": {"name": stage, "init": str(init), "train_embeddings": False},
            "data": {"photographs": data},
            "optimizer": {"learning_rate": 1e-3},
            "run": {"output": str(tmp_path / stage), "steps": 4, "save_every": 2, **run},
        }
        if stage == "dynamic":
            sizes = {"d_model": 16, "nhead": 2, "dim_feedforward": 32, "min_answer_length": 5}
            recipe["method"] = {"sparsity": sizes, "calibration_steps": 2}
        path = tmp_path / f"{stage}.yaml"
        path.write_text(yaml.safe_dump(recipe))
        return path

    return write


@pytest.mark.parametrize("stage", ["align", "dense", "dynamic"])
def test_a_stage_writes_a_model_with_its_own_tower_and_embeddings(
    stage: str, write_stage: WriteStage, small_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dynamic_llava.training.photo.words.PICTURES_AT_LEAST", 1)
    monkeypatch.setattr("dynamic_llava.training.photo.words.COMMON", 2.0)
    trained, _ = dynamic_llava.load(train(write_stage(stage)))
    before, _ = dynamic_llava.load(small_checkpoint)
    for part in ("model.vision_tower", "model.language_model.embed_tokens"):
        its, old = trained.get_submodule(part).state_dict(), before.get_submodule(part).state_dict()
        assert all(torch.equal(its[name], old[name]) for name in old), part
    weights = [m.model.multi_modal_projector.linear_1.weight for m in (trained, before)]
    assert not torch.equal(*weights)


def test_a_resumed_run_ends_as_one_that_never_stopped(write_stage: WriteStage, tmp_path: Path) -> None:
    whole = train(write_stage("dense", output=str(tmp_path / "whole")))
    recipe = write_stage("dense", output=str(tmp_path / "parts"))
    train(recipe)
    for name in ("model", "checkpoint-4"):
        _remove(tmp_path / "parts" / name)
    resumed = train(recipe, resume=True)
    first, second = (dynamic_llava.load_model(folder).state_dict() for folder in (whole, resumed))
    assert all(torch.equal(first[name], second[name]) for name in first)


def _remove(folder: Path) -> None:
    import shutil

    shutil.rmtree(folder)


def test_eager_attention_trains_as_sdpa_does(write_stage: WriteStage, tmp_path: Path) -> None:
    models = [
        dynamic_llava.load_model(
            train(write_stage("dense", output=str(tmp_path / attention), attention=attention))
        )
        for attention in ("sdpa", "eager")
    ]
    first, second = (model.state_dict() for model in models)
    for name in first:
        torch.testing.assert_close(first[name], second[name], atol=1e-4, rtol=1e-3, msg=name)


def test_eager_attention_is_not_for_the_dynamic_stage(write_stage: WriteStage) -> None:
    with pytest.raises(ValueError, match=r"run\.attention: the dynamic stage has an attention of its own"):
        train(write_stage("dynamic", attention="eager"))


def test_a_dry_run_looks_at_no_picture(
    write_stage: WriteStage, pictures: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(room, "open_image", lambda path: pytest.fail("a picture was opened"))
    plan = dry_run(write_stage("dense"))
    assert plan.steps == 4
    assert plan.tokens_per_sample > 5 * 9
    assert not (pictures / "features").exists()
