"""Token-exact labels: which tokens of a chat are answers, as a checkpoint's template and processor write it.

Nothing here knows a family: the template says what an answer ends with, and the processor says what it put in
the place of each picture.

Legend: N tokens, K pictures.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from PIL import Image
from torch import Tensor
from transformers import BatchFeature, ProcessorMixin

from dynamic_llava.chat.images import as_rgb
from dynamic_llava.chat.prompt import answer_begins, apply_template, assistant_turn, user_turn
from dynamic_llava.data.conversations import BadSample, Conversation

Span = tuple[int, int]


@dataclass(frozen=True)
class Rendered:
    """A conversation as its chat template writes it, and where its answers lie in that text."""

    name: str
    text: str
    answers: tuple[Span, ...]

    def until(self, character: int) -> Rendered:
        """Return what stands before a character that is in no answer."""
        answers = tuple(span for span in self.answers if span[1] <= character)
        return replace(self, text=self.text[:character], answers=answers)


def render(processor: ProcessorMixin, conversation: Conversation) -> Rendered:
    """Write a conversation with the checkpoint's chat template; an answer ends with its end mark.

    Templates that close an answer with no special token, such as Vicuna's in transformers, get the
    tokenizer's end mark there, as in LLaVA's own training: without it a model never learns to stop.

    Every answer follows what the template asks for it with, for that is what a model sees when it answers,
    see :func:`~dynamic_llava.chat.prompt.answer_begins`.

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
    text, spans, done = "", [], ""  # `done` is how the template writes what is in `text`
    answered = ""
    for number in range(1, len(messages), 2):
        asked = apply_template(processor, messages[:number], add_generation_prompt=True)
        answered = apply_template(processor, messages[: number + 1])
        given: str = messages[number]["content"][0]["text"]
        start = answer_begins(asked, answered, given)
        if start is None or not asked.startswith(done):
            raise BadSample(
                f"{conversation.name}: the chat template rewrites earlier turns; it cannot be trained on"
            )
        text += asked[len(done) :]
        begin = len(text)
        written = answered[start:].rstrip()
        text += _closed(processor.tokenizer, written, given)
        spans.append((begin, len(text)))
        done = answered[:start] + written
    return Rendered(conversation.name, text + answered[len(done) :].rstrip(), tuple(spans))


def _closed(tokenizer: Any, written: str, given: str) -> str:
    """Return an answer with the mark that ends it: the template's, or the tokenizer's where it wrote none.

    What is no special token ends no answer: a published template of LLaVA-NeXT misspells its mark.
    """
    marks = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    if written.endswith(tuple(marks)):
        return written
    text = given.strip()  # some templates trim it
    end = written.find(text) + len(text) if text in written else len(written)
    return written[:end] + str(tokenizer.eos_token)


@dataclass(frozen=True)
class Encoded:
    """Tokens of a chat and its pictures.

    Attributes
    ----------
    input_ids
        The tokens.
    answer_of, picture_of
        For each token the number of the answer, and of the picture, that it belongs to; -1 for none. All that
        the processor wrote for a picture belongs to it, marks and line ends included.
    placeholders
        Where each picture stands in the text of the chat.
    per_token
        What else the processor made for each token, by name, such as ``token_type_ids``: [N].
    for_pictures
        What it made of the pictures, by name, such as ``pixel_values`` and ``image_grid_thw``, as the model
        takes it.
    """

    input_ids: list[int]
    answer_of: list[int]
    picture_of: list[int]
    placeholders: tuple[int, ...] = ()
    per_token: Mapping[str, Tensor] = field(default_factory=dict)
    for_pictures: Mapping[str, Tensor] = field(default_factory=dict)

    def whole_pictures(self, length: int) -> int:
        """Return how many pictures lie in the first ``length`` tokens whole."""
        split = self.picture_of[length:]
        return min((number for number in split if number >= 0), default=len(self.placeholders))

    def cut(self, length: int) -> Encoded:
        """Return the first ``length`` tokens, in which all pictures lie whole."""
        return replace(
            self,
            input_ids=self.input_ids[:length],
            answer_of=self.answer_of[:length],
            picture_of=self.picture_of[:length],
            per_token={name: value_N[:length] for name, value_N in self.per_token.items()},
        )


def encode_within(
    processor: ProcessorMixin, rendered: Rendered, images: Sequence[Image.Image], length: int
) -> tuple[Encoded, bool]:
    """Tokenise a chat to at most ``length`` tokens, and say whether it was longer.

    A picture that does not fit goes with all behind it. What stands before is encoded anew without it, for
    some processors make other tokens of one picture than of each of several.
    """
    encoded = encode(processor, rendered, images)
    is_longer = len(encoded.input_ids) > length
    while len(encoded.input_ids) > length and (whole := encoded.whole_pictures(length)) < len(images):
        rendered, images = rendered.until(encoded.placeholders[whole]), images[:whole]
        encoded = encode(processor, rendered, images)
    return encoded.cut(length), is_longer


def encode(processor: ProcessorMixin, rendered: Rendered, images: Sequence[Image.Image]) -> Encoded:
    """Tokenise a chat, with what the processor writes in the place of its pictures.

    Raises
    ------
    BadSample
        If the processor does not say where it wrote what.
    """
    begin = processor.tokenizer.bos_token
    given: Any = {
        "text": [rendered.text],
        "images": [[as_rgb(image) for image in images]] if images else None,
        "add_special_tokens": begin is None or not rendered.text.startswith(begin),
        "return_offsets_mapping": True,
        "return_text_replacement_offsets": True,
        "verbose": False,  # what is too long is cut, or refused by name
    }
    made = dict(processor(**given))
    offsets_N, replaced = made.pop("offset_mapping")[0], made.pop("text_replacement_offsets", [])
    places = replaced[0] if replaced else []
    if len(places) != len(images):
        raise BadSample(
            f"{rendered.name}: {type(processor).__name__} tells of {len(places)} places where it wrote a "
            f"picture, and there are {len(images)}: it cannot be trained with"
        )
    pictures = [place["new_span"] for place in places]
    grown = Growth([place["span"] for place in places], pictures)
    answers = [(grown.moved(first), grown.moved(last)) for first, last in rendered.answers]
    per_token, for_pictures = _given(made, len(offsets_N))
    return Encoded(
        list(made["input_ids"][0]),
        _ending_in(offsets_N, answers),
        _touching(offsets_N, pictures),
        tuple(place["span"][0] for place in places),
        per_token,
        for_pictures,
    )


@dataclass(frozen=True)
class Growth:
    """Where characters went when placeholders were replaced by longer texts."""

    before: Sequence[Span]
    after: Sequence[Span]

    def moved(self, character: int) -> int:
        """Return the new place of a character that is in no placeholder."""
        passed = sum(end <= character for _, end in self.before)
        return character + (self.after[passed - 1][1] - self.before[passed - 1][1] if passed else 0)


UNUSED = frozenset({"input_ids", "attention_mask"})  # batches have their own


def _given(made: Mapping[str, Any], length: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return what a processor made besides the ids, as tensors: for each token, and for pictures."""
    rest = BatchFeature({name: value for name, value in made.items() if name not in UNUSED})
    tensors: Mapping[str, Tensor] = rest.convert_to_tensors("pt")
    per_token = {name: value[0] for name, value in tensors.items() if value.shape == (1, length)}
    return per_token, {name: value for name, value in tensors.items() if name not in per_token}


def _ending_in(offsets_N: Sequence[Span], spans: Sequence[Span]) -> list[int]:
    """Return in which span the last character of each token lies; -1 for none."""
    return _numbers(offsets_N, spans, lambda start, end, first, last: first < end <= last)


def _touching(offsets_N: Sequence[Span], spans: Sequence[Span]) -> list[int]:
    """Return the first span in which any character of each token lies; -1 for none."""
    return _numbers(offsets_N, spans, lambda start, end, first, last: start < last and first < end)


def _numbers(
    offsets_N: Sequence[Span], spans: Sequence[Span], belongs: Callable[[int, int, int, int], bool]
) -> list[int]:
    """Return the first span that each token belongs to; tokens of no character belong to none."""
    result = []
    for start, end in offsets_N:
        inside = (number for number, span in enumerate(spans) if start < end and belongs(start, end, *span))
        result.append(next(inside, -1))
    return result
