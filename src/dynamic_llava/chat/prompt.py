"""Makes the text of a prompt: turns with their pictures in place, written by a checkpoint's chat template."""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from typing import Any

from transformers import ProcessorMixin

from dynamic_llava.files import first_line

PLACEHOLDER = "<image>"
"""Where a picture stands in a user's prompt; without any, the pictures come first."""

BLANK_LINES = re.compile(r"\A(?:[^\S\n]*\n)+")
CLOSING = ".,;:!?)]}\u2026"
"""What goes on with the word before it, even where a picture lies between."""


def chat_prompt(
    processor: ProcessorMixin, prompt: str, pictures: int, earlier: Sequence[tuple[str, str]] = ()
) -> str:
    """Put a user turn, after ``earlier`` ones, into the checkpoint's chat template, ready for the answer.

    Parameters
    ----------
    processor : ProcessorMixin
        The checkpoint's processor.
    prompt : str
        The user's text. Each ``<image>`` in it stands for one picture, in order.
    pictures : int
        How many pictures come with it; they belong to the first turn.
    earlier : sequence of (str, str)
        Questions and answers of the turns before.

    Raises
    ------
    ValueError
        The prompt is empty or no valid text, its placeholders do not match the pictures, or the chat template
        is missing or broken.
    """
    return apply_template(processor, _turns(prompt, pictures, earlier), add_generation_prompt=True)


def chat_answer(
    processor: ProcessorMixin,
    prompt: str,
    pictures: int,
    answer: str,
    earlier: Sequence[tuple[str, str]] = (),
) -> str:
    """Return what the chat template puts after `chat_prompt` for ``answer``, with its end mark.

    Raises
    ------
    ValueError
        The template renders the prompt differently once it is answered, or as `chat_prompt` does.
    """
    turns = [*_turns(prompt, pictures, earlier), assistant_turn(answer)]
    asked, answered = chat_prompt(processor, prompt, pictures, earlier), apply_template(processor, turns)
    begin = answer_begins(asked, answered, turns[-1]["content"][0]["text"])
    if begin is None:
        raise ValueError("the chat template rewrites the prompt once it is answered; it cannot be scored")
    return answered[begin:]


def answer_begins(asked: str, answered: str, answer: str) -> int | None:
    """Return where the answer begins in ``answered``; None where it does not follow what was asked.

    Only white space may differ between what asks for an answer and what stands before one that was given:
    LLaVA-OneVision's template writes one space more before the latter.
    """
    if answered.startswith(asked):
        return len(asked)
    pairs = zip(asked, answered, strict=False)
    same = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))
    spaces = len(answered) - same - len(answered[same:].lstrip())
    place = answered.find(answer, same) if answer else same + spaces
    return None if place < 0 or (asked[same:] + answered[same:place]).strip() else place


def apply_template(
    processor: ProcessorMixin, turns: list[dict[str, Any]], add_generation_prompt: bool = False
) -> str:
    """Write turns with the checkpoint's chat template; ``ValueError`` where it has none, or it is broken."""
    if processor.chat_template is None:
        raise ValueError("the checkpoint has no chat template; add a chat_template.jinja to its folder")
    try:
        text = processor.apply_chat_template(
            turns, add_generation_prompt=add_generation_prompt, tokenize=False
        )
    except Exception as error:  # a template is a program: it may raise anything
        raise ValueError(
            f"the checkpoint's chat template cannot write this prompt ({type(error).__name__}: "
            f"{first_line(error)}); correct it in the checkpoint's folder"
        ) from error
    return str(text)


def check_text(text: str) -> None:
    """Refuse text that no tokenizer takes.

    Raises
    ------
    ValueError
        It holds half a surrogate pair: bytes of a command line that are no UTF-8, or a broken escape in JSON.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            "the text is not valid Unicode: half a surrogate pair, or bytes that are not UTF-8, at character "
            f"{error.start + 1}; write it anew"
        ) from error


def user_turn(text: str) -> dict[str, Any]:
    """Return what a user says, with a picture in the place of every ``<image>``.

    Text keeps its own spaces, but for those that only part it from a picture at its beginning or end, see
    `_begun`. Some templates write all pictures first: words on both sides of a picture stay apart even so.
    """
    first, *rest = _pieces(text)
    content = [_text_part(first)]
    for piece in rest:
        content += [{"type": "image"}, _text_part(piece)]
    return {"role": "user", "content": [part for part in content if part.get("text") != ""]}


def without_placeholders(text: str) -> str:
    """Return a user's text as a template that writes the pictures elsewhere joins it."""
    return "".join(_pieces(text))


def assistant_turn(answer: str) -> dict[str, Any]:
    """Return what the model answers."""
    return {"role": "assistant", "content": [_text_part(_begun(answer).rstrip())]}


def _turns(prompt: str, pictures: int, earlier: Sequence[tuple[str, str]]) -> list[dict[str, Any]]:
    """Return all turns up to ``prompt``; the pictures go to the first one."""
    turns = []
    for question, answer in earlier:
        turns += [user_turn(_placed(question, pictures)), assistant_turn(answer)]
        pictures = 0
    return [*turns, user_turn(_placed(prompt, pictures))]


def _placed(prompt: str, pictures: int) -> str:
    """Return the prompt with one placeholder for each picture."""
    placeholders = prompt.count(PLACEHOLDER)
    if placeholders not in (0, pictures):
        raise ValueError(
            f"the prompt has {placeholders} {PLACEHOLDER} placeholders for {pictures} pictures; "
            "give one for each picture, or none to put the pictures first"
        )
    if not prompt.replace(PLACEHOLDER, "").strip():
        raise ValueError("the prompt is empty; write a question or a request")
    return prompt if placeholders else PLACEHOLDER * pictures + prompt


def _pieces(text: str) -> list[str]:
    """Return the text before, between and after the placeholders, ready to be joined without them."""
    pieces = text.split(PLACEHOLDER)
    spoken = [number for number, piece in enumerate(pieces) if piece.strip()]
    if not spoken:
        return [""] * len(pieces)
    pieces = [piece if number in spoken else "" for number, piece in enumerate(pieces)]
    pieces[spoken[0]] = _begun(pieces[spoken[0]])
    pieces[spoken[-1]] = pieces[spoken[-1]].rstrip()
    for before, after in itertools.pairwise(spoken):
        if not (pieces[before][-1].isspace() or pieces[after][0].isspace() or pieces[after][0] in CLOSING):
            pieces[before] += " "
    return pieces


def _begun(text: str) -> str:
    """Return a text without what only parts it from what stands before: blank lines, or a single space.

    More than one space, or a tab, is the indentation of its first line, which means something.
    """
    text = BLANK_LINES.sub("", text)
    return text if text[1:2].isspace() or text[:1] == "\t" else text.lstrip()


def _text_part(text: str) -> dict[str, str]:
    check_text(text)
    return {"type": "text", "text": text}
