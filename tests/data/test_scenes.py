"""Scenes: reproducible, true to their questions, and held out by layout."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import ImageColor

from dynamic_llava.data import scenes

INDICES = st.integers(0, 10**9)
SPLITS = st.sampled_from(["train", "heldout"])


def _answer(index: int, split: scenes.Split, kind: str) -> tuple[str, str]:
    turn = next(turn for turn in scenes.make(index, split).turns if turn.kind == kind)
    return turn.question, turn.answer


@given(INDICES, SPLITS)
def test_same_arguments_give_the_same_scene(index: int, split: scenes.Split) -> None:
    first, second = scenes.make(index, split), scenes.make(index, split)
    assert first.turns == second.turns
    assert first.open_image().tobytes() == second.open_image().tobytes()


def test_no_layout_is_in_both_splits_and_all_are_used() -> None:
    train, heldout = set(scenes.layouts("train")), set(scenes.layouts("heldout"))
    assert not train & heldout
    assert len(train | heldout) == 456
    assert 0.15 < len(heldout) / 456 < 0.25


@given(INDICES, SPLITS)
def test_scene_lies_in_its_split_layout(index: int, split: scenes.Split) -> None:
    cells = tuple(thing.cell for thing in scenes.scene(index, split).things)
    assert cells in scenes.layouts(split)


@given(INDICES)
def test_every_object_shows_its_color_at_its_center_and_stays_in_its_cell(index: int) -> None:
    drawn = scenes.scene(index, "train")
    picture = drawn.draw()
    pixels = np.asarray(picture)
    for thing in drawn.things:
        assert picture.getpixel(tuple(round(value) for value in thing.center)) == ImageColor.getrgb(
            thing.color
        )
    occupied = {thing.cell for thing in drawn.things}
    for cell in set(range(9)) - occupied:
        row, column = (scenes.CELL * place for place in divmod(cell, 3))
        inside = pixels[row : row + scenes.CELL, column : column + scenes.CELL].reshape(-1, 3)
        assert (inside == drawn.background).all()


@given(INDICES)
def test_position_size_and_existence_answers_are_true(index: int) -> None:
    things = {thing.name: thing for thing in scenes.scene(index, "heldout").things}
    question, answer = _answer(index, "heldout", "position")
    assert things[question.removeprefix("Where is the ").rstrip("?")].position == answer
    question, answer = _answer(index, "heldout", "size")
    assert things[question.removeprefix("Is the ").split(" large or")[0]].size == answer
    question, answer = _answer(index, "heldout", "exists")
    assert (question.removeprefix("Is there a ").rstrip("?") in things) == (answer == "yes")


@given(INDICES)
def test_relation_answer_follows_the_cells(index: int) -> None:
    things = {thing.name: thing for thing in scenes.scene(index, "train").things}
    question, answer = _answer(index, "train", "relation")
    relation = next(relation for relation in scenes.RELATIONS if f" {relation} the " in question)
    first, second = question.removeprefix("Is the ").rstrip("?").split(f" {relation} the ")
    (row, column), (other_row, other_column) = (divmod(things[name].cell, 3) for name in (first, second))
    holds = {
        "to the left of": column < other_column,
        "to the right of": column > other_column,
        "above": row < other_row,
        "below": row > other_row,
    }
    assert holds[relation] == (answer == "yes")


@given(INDICES)
def test_count_answer_is_the_number_of_matching_objects(index: int) -> None:
    things = scenes.scene(index, "train").things
    question, answer = _answer(index, "train", "count")
    asked = question.removeprefix("How many ").removesuffix(" are there?").removesuffix("objects").strip()
    matching = [t for t in things if not asked or asked.removesuffix("s") in (t.color, t.size, t.shape)]
    assert scenes.NUMBERS[len(matching)] == answer


@pytest.mark.parametrize("index", range(20))
def test_description_names_every_object_once_in_reading_order(index: int) -> None:
    drawn = scenes.scene(index, "heldout")
    text = drawn.description
    starts = [text.index(f"there is a {thing.size} {thing.name}") for thing in drawn.things]
    assert starts == sorted(starts)
    assert text.count("there is a ") == len(drawn.things)
