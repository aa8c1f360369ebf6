"""Every family's template and processor: labels exact to the token, pictures told apart, cuts and batches.

What is compared with is transformers itself: its masks of generated tokens, what it feeds at inference, and
how its processors pad a batch; and what each family says of the pictures of a call.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from evidence.tiny_processors import KINDS
from PIL import Image
from tests.families import trained
from torch import Tensor

from dynamic_llava.chat import asking
from dynamic_llava.chat.prompt import chat_answer, chat_prompt, user_turn
from dynamic_llava.data.conversations import Conversation
from dynamic_llava.data.labels import Encoded, encode, encode_within, render
from dynamic_llava.data.training import FOR_TRAINING, collate
from dynamic_llava.families import family_of

TURNS = (
    ("<image>\nWhat colour? <image>", "A deep red.\n\n  And round."),
    ("And the <image> shape?", "Round,  I think."),
    ("Sure?", "    Yes"),
)
SIZES = ((32, 30), (16, 33), (40, 20))
PICTURES = [
    Image.new("RGB", size, colour) for size, colour in zip(SIZES, ("red", "blue", "green"), strict=True)
]

# How a template writes the text of a turn, and what closes a turn; both go into generation markers.
CHATML = ("{{ part['text'] }}", "<|im_end|>\n")
WRITTEN = {
    "qwen2_vl": CHATML,
    "qwen2_5_vl": CHATML,
    "qwen3_vl": ("{{- part.text }}", "{{- '<|im_end|>\n' }}"),
    "internvl": ("{{ part['text'] }}", "{{'<|im_end|>\n'}}"),
    "gemma3": ("{{ item['text'] | trim }}", "{{ '<end_of_turn>\n' }}"),
}


def marked(kind: str) -> str:
    """The template, with generation markers around each answer and its end."""
    (text, close), end = WRITTEN[kind], KINDS[kind].end
    is_answer = "{% if message['role'] == 'assistant' %}"
    before, _, after = KINDS[kind].template.rpartition(close)  # the first one may close a system turn
    spoken = f"{is_answer}{{% generation %}}{text}{end}{{% endgeneration %}}{{% else %}}{text}{{% endif %}}"
    return before.replace(text, spoken) + f"{is_answer}{{% else %}}{end}{{% endif %}}{{{{ '\n' }}}}" + after


TRIMMED = ("gemma3",)  # templates that take the spaces off an answer


def talk(turns: tuple[tuple[str, str], ...] = TURNS) -> Conversation:
    return Conversation("x", (), turns)


def encoded(kind: str, turns: tuple[tuple[str, str], ...] = TURNS) -> Encoded:
    processor = trained.processor(kind)
    shown = sum(question.count("<image>") for question, _ in turns)
    return encode(processor, render(processor, talk(turns)), PICTURES[:shown])


def given(made: Encoded) -> dict[str, Tensor]:
    """What the model takes."""
    ids = torch.tensor([made.input_ids])
    per_token = {name: value[None] for name, value in made.per_token.items()}
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), **per_token, **made.for_pictures}


def item(made: Encoded, sample: int) -> dict[str, Any]:
    """The same as the data set makes it."""
    ids, answer_of = torch.tensor(made.input_ids), torch.tensor(made.answer_of)
    return {
        "input_ids": ids, "labels": torch.where(answer_of >= 0, ids, -100), "answer_mask": answer_of >= 0,
        "per_token": made.per_token, "for_pictures": tuple(made.for_pictures), **made.for_pictures,
        "sample": sample, "skipped": [], "truncated": 0, "cut": [],
    }  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_labels_are_the_answers_and_their_end_marks(kind: str) -> None:
    made, tokenizer = encoded(kind), trained.processor(kind).tokenizer
    for number, (_, answer) in enumerate(TURNS):
        ids = [i for i, of in zip(made.input_ids, made.answer_of, strict=True) if of == number]
        said = answer.strip() if kind in TRIMMED else answer
        assert tokenizer.decode(ids) in (f"{space}{said}{KINDS[kind].end}" for space in ("", " "))
        assert ids[-1] == tokenizer.convert_tokens_to_ids(KINDS[kind].end)


@pytest.mark.parametrize("kind", KINDS)
def test_the_first_answer_follows_what_transformers_feeds(kind: str) -> None:
    processor: Any = trained.processor(kind)
    made = encoded(kind)
    content = [
        part if part["type"] == "text" else {"type": "image", "image": picture}
        for part, picture in zip(
            user_turn(TURNS[0][0])["content"], [PICTURES[0], None, PICTURES[1]], strict=True
        )
    ]
    theirs = processor.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=True, return_dict=True
    )
    start = made.answer_of.index(0)
    assert made.input_ids[:start] == list(theirs["input_ids"][0])


@pytest.mark.parametrize("kind", KINDS)
def test_a_question_is_fed_as_transformers_feeds_it(kind: str) -> None:
    processor: Any = trained.processor(kind)
    contents = [
        [{"type": "image", "image": picture} for picture in some] for some in (PICTURES[:2], PICTURES[2:])
    ]
    turns = [
        [{"role": "user", "content": [*content, {"type": "text", "text": "Why?"}]}] for content in contents
    ]
    theirs = processor.apply_chat_template(
        turns, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt", padding=True
    )
    ours = asking.encode(processor, [chat_prompt(processor, "Why?", count) for count in (2, 1)], PICTURES)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], value) for name, value in theirs.items())


@pytest.mark.parametrize("kind", WRITTEN)
def test_labels_are_what_transformers_says_that_the_model_generates(kind: str) -> None:
    processor: Any = trained.processor(kind)
    pictures, messages = iter(PICTURES), []
    for question, answer in TURNS:
        content = [
            part if part["type"] == "text" else {"type": "image", "image": next(pictures)}
            for part in user_turn(question)["content"]
        ]
        messages.append({"role": "user", "content": content})
        messages.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
    theirs = processor.apply_chat_template(
        messages,
        chat_template=marked(kind),
        tokenize=True,
        return_dict=True,
        return_assistant_tokens_mask=True,
    )
    if not any(theirs["assistant_masks"][0]):
        pytest.skip("transformers of this version marks no answer of it")
    made = encoded(kind)
    length = len(made.input_ids)
    assert made.input_ids == list(theirs["input_ids"][0])[:length]
    assert [int(of >= 0) for of in made.answer_of] == list(theirs["assistant_masks"][0])[:length]
    assert not any(list(theirs["assistant_masks"][0])[length:])


@pytest.mark.parametrize("kind", KINDS)
def test_pictures_are_those_of_the_family(kind: str) -> None:
    made, model = encoded(kind), trained.model(kind)
    theirs = family_of(model).pictures(model.base_model, given(made))
    owners = [{made.picture_of[place] for place in picture_I.tolist()} for picture_I in theirs]
    assert all(len(owner) == 1 for owner in owners)  # a tile lies in one picture
    assert [owner for before, owner in zip([None, *owners], owners, strict=False) if owner != before] == [
        {0},
        {1},
        {2},
    ]
    mark = made.input_ids[int(theirs[0][0])]
    inside = {place for picture_I in theirs for place in picture_I.tolist()}
    assert inside == {n for n, token in enumerate(made.input_ids) if token == mark}
    assert all(made.picture_of[place] >= 0 for place in inside)


@pytest.mark.parametrize("kind", KINDS)
def test_a_cut_keeps_whole_pictures_and_what_the_model_takes(kind: str) -> None:
    processor, model = trained.processor(kind), trained.model(kind)
    rendered = render(processor, talk())
    whole = encode(processor, rendered, PICTURES)
    base, family = model.base_model, family_of(model)
    for length in range(3, len(whole.input_ids) + 3, 4):
        kept, is_longer = encode_within(processor, rendered, PICTURES, length)
        assert len(kept.input_ids) <= length
        assert is_longer == (len(whole.input_ids) > length)
        assert len(kept.input_ids) == len(kept.answer_of) == len(kept.picture_of)
        pictures = family.pictures(base, given(kept))  # raises where tokens and pictures do not agree
        assert set(kept.picture_of) - {-1} == set(range(len(kept.placeholders)))
        assert bool(pictures) == bool(kept.placeholders)
        if kept.placeholders == whole.placeholders:
            assert kept.input_ids == whole.input_ids[:length]


@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_is_what_the_processor_pads(kind: str) -> None:
    processor: Any = trained.processor(kind)
    talks = [TURNS, TURNS[1:]]
    texts = [render(processor, talk(turns)).text for turns in talks]
    begin = processor.tokenizer.bos_token
    theirs = processor(
        text=texts, images=[PICTURES, PICTURES[:1]], padding=True, padding_side="right", return_tensors="pt",
        add_special_tokens=begin is None or not texts[0].startswith(begin),
    )  # fmt: skip
    items = [item(encoded(kind, turns), number) for number, turns in enumerate(talks)]
    (group,) = collate(items, pad=processor.tokenizer.pad_token_id)["groups"]
    ours = {name: value for name, value in group.items() if name not in FOR_TRAINING}
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        assert torch.equal(ours[name], value.to(ours[name].dtype)), name


@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_with_a_row_of_text_alone_runs(kind: str) -> None:
    model = trained.model(kind)
    items = [item(encoded(kind, turns), number) for number, turns in enumerate([TURNS[2:], TURNS])]
    (group,) = collate(items, pad=0)["groups"]
    alone = [collate([one], pad=0)["groups"][0] for one in items]
    with torch.no_grad():
        together, *apart = (
            model(**{name: value for name, value in given.items() if name not in FOR_TRAINING}).logits
            for given in (group, *alone)
        )
    for row, logits in enumerate(apart):
        assert torch.allclose(together[row, : logits.shape[1]], logits[0], atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_an_answer_can_be_scored(kind: str) -> None:
    said = chat_answer(trained.processor(kind), "Why?", 1, "So it is.", (("And?", "No."),))
    assert said.lstrip().startswith("So it is.")
