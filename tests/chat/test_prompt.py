"""Prompts and their placeholders: the text that a chat template makes of a question and its pictures."""

from __future__ import annotations

import copy

import pytest
from transformers import LlavaProcessor

from dynamic_llava.chat.prompt import chat_answer, chat_prompt, without_placeholders


def test_picture_comes_first_without_placeholder(processor: LlavaProcessor) -> None:
    assert chat_prompt(processor, " what is it? ", 1) == "<s>USER: <image>\nwhat is it? ASSISTANT:"


def test_answer_continues_its_prompt(processor: LlavaProcessor) -> None:
    continuation = chat_answer(processor, "what is it?", 1, "a star")
    assert continuation == " a star</s>"


@pytest.mark.parametrize(
    ("prompt", "pictures"),
    [
        ("<image> what is it?", 2),
        ("<image> or <image>?", 1),
        ("<image> what is it?", 0),
        ("<image> " * 3 + "?", 2),
    ],
)
def test_placeholders_must_match_pictures(processor: LlavaProcessor, prompt: str, pictures: int) -> None:
    message = rf"{prompt.count('<image>')} <image> placeholders for {pictures} pictures"
    with pytest.raises(ValueError, match=message):
        chat_prompt(processor, prompt, pictures)


@pytest.mark.parametrize("prompt", ["", "  \n", "<image>"])
def test_empty_prompt(processor: LlavaProcessor, prompt: str) -> None:
    with pytest.raises(ValueError, match="the prompt is empty"):
        chat_prompt(processor, prompt, 1)


def test_processor_without_chat_template(processor: LlavaProcessor) -> None:
    bare = copy.copy(processor)
    bare.chat_template = None
    with pytest.raises(ValueError, match="no chat template"):
        chat_prompt(bare, "what is it?", 1)


def test_the_room_gives_its_names() -> None:
    from dynamic_llava import chat

    assert all(callable(getattr(chat, name)) for name in chat.__all__)
    with pytest.raises(AttributeError, match="nobody"):
        _ = chat.nobody


PICTURES_FIRST = """{% for m in messages %}{{ m['role'] }}: {% for p in m['content'] %}\
{% if p['type'] == 'image' %}<image>
{% endif %}{% endfor %}{% for p in m['content'] %}{% if p['type'] == 'text' %}{{ p['text'] }}{% endif %}\
{% endfor %}|{% endfor %}"""
IN_PLACE = """{% for m in messages %}{{ m['role'] }}: {% for p in m['content'] %}\
{% if p['type'] == 'image' %}<image>{% else %}{{ p['text'] }}{% endif %}{% endfor %}|{% endfor %}"""


def written(processor: LlavaProcessor, template: str, text: str) -> str:
    """The text of one user turn as a template writes it."""
    processor = copy.copy(processor)
    processor.chat_template = template
    prompt = chat_prompt(processor, text, text.count("<image>"))
    return prompt.removeprefix("user: ").removesuffix("|")


@pytest.mark.parametrize(
    ("text", "first", "in_place"),
    [
        ("Look at <image> and tell me", "<image>\nLook at  and tell me", "Look at <image> and tell me"),
        (
            "Compare <image> with <image>.",
            "<image>\n<image>\nCompare  with .",
            "Compare <image> with <image>.",
        ),
        ("Look at<image>and tell", "<image>\nLook at and tell", "Look at <image>and tell"),
        ("A\n<image>\nB", "<image>\nA\n\nB", "A\n<image>\nB"),
        ("(see <image>), then go", "<image>\n(see ), then go", "(see <image>), then go"),
        ("One.<image><image>Two", "<image>\n<image>\nOne. Two", "One. <image><image>Two"),
        ("One<image> \n<image>two", "<image>\n<image>\nOne two", "One <image><image>two"),
        ("say <ima<image>ge> twice", "<image>\nsay <ima ge> twice", "say <ima <image>ge> twice"),
    ],
)
def test_words_around_a_picture_stay_apart(
    text: str, first: str, in_place: str, processor: LlavaProcessor
) -> None:
    assert written(processor, PICTURES_FIRST, text) == first
    assert written(processor, IN_PLACE, text) == in_place


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("<image>\n    if x:\n        y", "    if x:\n        y"),
        ("<image>\n\tif x:\n\t\ty", "\tif x:\n\t\ty"),
        ("\n \n    if x:\n        y\n\n", "    if x:\n        y"),
        ("Explain:\n    if x:\n<image>\n        y", "Explain:\n    if x:\n\n        y"),
        ("two  spaces\n\n  and  lines", "two  spaces\n\n  and  lines"),
    ],
)
def test_text_keeps_its_own_spaces(text: str, kept: str, processor: LlavaProcessor) -> None:
    assert written(processor, PICTURES_FIRST, text).removeprefix("<image>\n") == kept


@pytest.mark.parametrize(
    "text",
    ["<image>\nWhat?", "<image> What?", "What?\n<image>", "What? <image>", " What? ", "<image>\n What?\n"],
)
def test_space_that_only_parts_text_from_a_picture_goes(text: str, processor: LlavaProcessor) -> None:
    assert written(processor, PICTURES_FIRST, text).removeprefix("<image>\n") == "What?"


def test_an_answer_keeps_its_indentation(processor: LlavaProcessor) -> None:
    assert chat_answer(processor, "Write code", 1, "    if x:\n        y\n") == "     if x:\n        y</s>"


def test_text_without_placeholders_keeps_words_apart_and_spaces() -> None:
    assert without_placeholders("<image>\n    x = 1<image>y") == "    x = 1 y"
