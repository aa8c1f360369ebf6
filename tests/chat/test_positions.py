"""What does not fit into the model's positions is refused, with its name and what would fit."""

from __future__ import annotations

import pytest
from PIL import Image
from transformers import LlamaConfig, LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor

from dynamic_llava.chat.asking import ask
from dynamic_llava.chat.positions import check_positions, positions_of


def test_positions_are_those_of_the_decoder() -> None:
    assert positions_of(LlavaConfig(text_config=LlamaConfig(max_position_embeddings=77))) == 77


@pytest.mark.parametrize(("tokens", "new_tokens"), [(100, 0), (60, 40), (1, 1)])
def test_what_fits(tokens: int, new_tokens: int) -> None:
    check_positions(100, tokens, new_tokens)
    check_positions(None, 10**6 * tokens, new_tokens)


@pytest.mark.parametrize(
    ("tokens", "new_tokens", "message"),
    [
        (1234, 0, "x: 1,234 tokens, those of pictures included, are too many .* 100 positions; shorten it$"),
        (101, 5, "shorten it$"),
        (60, 41, "and an answer of 41 are too many .* ask for at most 40 new tokens$"),
    ],
)
def test_what_does_not_fit(tokens: int, new_tokens: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_positions(100, tokens, new_tokens, "x")


def test_ask(model: LlavaForConditionalGeneration, processor: LlavaProcessor) -> None:
    model.config.text_config.max_position_embeddings = 160
    picture = Image.new("RGB", (8, 8))
    ask(model, processor, "what?", [picture], max_new_tokens=2)
    with pytest.raises(ValueError, match=r"the prompt: .* tokens, .* 160 positions"):
        ask(model, processor, "what?", [picture, picture], max_new_tokens=2)
    with pytest.raises(ValueError, match="ask for at most"):
        ask(model, processor, "what?", [picture], max_new_tokens=20)
