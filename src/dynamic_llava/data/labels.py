"""Token-exact labels: which tokens of a chat are answers.

Legend: N tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image
from transformers import ProcessorMixin

from dynamic_llava.chat.images import as_rgb
from dynamic_llava.chat.prompt import PLACEHOLDER, apply_template, assistant_turn, user_turn
from dynamic_llava.data.conversations import BadSample, Conversation


@dataclass(frozen=True)
class Rendered:
    """A conversation as its chat template writes it, and where its answers lie in that text."""

    name: str
    text: str
    answers: tuple[tuple[int, int], ...]


def render(processor: ProcessorMixin, conversation: Conversation) -> Rendered:
    """Write a conversation with the checkpoint's chat template; an answer ends with its end mark.

    Templates that close an answer with nothing, such as Vicuna's in transformers, get the tokenizer's end
    mark there, as in LLaVA's own training: without it a model never learns to stop.

    Raises
    ------
    BadSample
        If the template rewrites earlier turns, so that training would not see what inference does.
    """
    messages = [
        turn
        for question, answer in conversation.turns
        for turn in (user_turn(question), assistant_turn(answer))
    ]
    text, spans = "", []
    whole = apply_template(processor, messages)
    done = 0  # how much of `whole` is in `text`
    for number in range(1, len(messages), 2):
        asked = apply_template(processor, messages[:number], add_generation_prompt=True)
        answered = apply_template(processor, messages[: number + 1])
        if not (whole.startswith(asked) and whole.startswith(answered.rstrip())):
            raise BadSample(
                f"{conversation.name}: the chat template rewrites earlier turns; it cannot be trained on"
            )
        text += whole[done : len(asked)]
        start = len(text)
        answer = whole[len(asked) : len(answered)].rstrip()
        done = len(asked) + len(answer)
        ends = processor.tokenizer.all_special_tokens
        text += answer if answer.endswith(tuple(ends)) else answer + processor.tokenizer.eos_token
        spans.append((start, len(text)))
    return Rendered(conversation.name, text + whole[done:].rstrip(), tuple(spans))


@dataclass(frozen=True)
class Encoded:
    """Tokens of a chat and its pictures.

    Attributes
    ----------
    input_ids
        The tokens.
    answer_of, picture_of
        For each token the number of the answer, and of the picture, that it belongs to; -1 for none.
    pixel_values
        One entry for each picture.
    """

    input_ids: list[int]
    answer_of: list[int]
    picture_of: list[int]
    pixel_values: Sequence[Any]

    def cut(self, length: int) -> Encoded:
        """Return at most the first ``length`` tokens, with those pictures that lie in them whole."""
        if len(self.input_ids) <= length:
            return self
        picture = self.picture_of[length]
        end = length if picture < 0 else self.picture_of.index(picture)
        pictures = max(self.picture_of[:end], default=-1) + 1
        return Encoded(
            self.input_ids[:end], self.answer_of[:end], self.picture_of[:end], self.pixel_values[:pictures]
        )


def encode(processor: ProcessorMixin, rendered: Rendered, images: Sequence[Image.Image]) -> Encoded:
    """Tokenise a chat with its pictures' placeholders expanded by the processor."""
    begin = processor.tokenizer.bos_token
    special = begin is None or not rendered.text.startswith(begin)
    given = {
        "text": [rendered.text],
        "images": [as_rgb(image) for image in images] or None,
        "add_special_tokens": special,
        "verbose": False,  # what is too long is cut, or refused by name
    }
    outputs = processor(**given)
    plain = processor.tokenizer(
        rendered.text, return_offsets_mapping=True, add_special_tokens=special, verbose=False
    )
    spans = _answers(plain["offset_mapping"], rendered.answers)
    picture = processor.tokenizer.convert_tokens_to_ids(getattr(processor, "image_token", PLACEHOLDER))
    ids = list(outputs["input_ids"][0])
    try:
        answer_of, picture_of = _expanded(ids, plain["input_ids"], spans, picture)
    except BadSample as error:
        raise BadSample(f"{rendered.name}: {error}") from None
    return Encoded(ids, answer_of, picture_of, outputs.get("pixel_values", ()))


def _answers(offsets: Sequence[tuple[int, int]], answers: Sequence[tuple[int, int]]) -> list[int]:
    """Return to which answer each token belongs: that in which its last character lies."""
    result = []
    for start, end in offsets:
        inside = [i for i, (first, last) in enumerate(answers) if start < end and first < end <= last]
        result.append(inside[0] if inside else -1)
    return result


def _expanded(
    ids: list[int], plain: Sequence[int], spans: Sequence[int], picture: int
) -> tuple[list[int], list[int]]:
    """Return for each token, pictures expanded, to which answer and to which picture it belongs."""
    result: list[int] = []
    pictures: list[int] = []
    for token, span in zip(plain, spans, strict=True):
        if token != picture:
            if len(result) >= len(ids) or ids[len(result)] != token:
                raise BadSample("the processor does more than repeat image tokens; it cannot be trained with")
            result.append(span)
            pictures.append(-1)
            continue
        number = max(pictures, default=-1) + 1
        before = len(result)
        while len(result) < len(ids) and ids[len(result)] == picture:
            result.append(-1)
            pictures.append(number)
        if len(result) == before:
            raise BadSample("two pictures lie side by side, with no token between them")
    if len(result) != len(ids):
        raise BadSample("the processor does more than repeat image tokens; it cannot be trained with")
    return result, pictures
