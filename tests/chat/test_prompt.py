"""Prompts and their placeholders: the text that a chat template makes of a question and its pictures."""

from __future__ import annotations

import copy

import pytest
from transformers import LlavaProcessor

from dynamic_llava.chat.prompt import chat_answer, chat_prompt


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
