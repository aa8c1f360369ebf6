"""Labels are exact to the token; batches, order and losses of data are what they should be."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from tests.data.test_conversations import entry
from transformers import LlavaProcessor

from dynamic_llava.data.conversations import BadSample, Conversation, Conversations
from dynamic_llava.data.labels import encode, render
from dynamic_llava.data.training import IGNORE, ConversationDataset, LengthGrouped, collate
from dynamic_llava.training import nano

QWEN = """{% for m in messages %}<|im_start|>{{ m['role'] }}
{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'][0]['text'] }}<|im_end|>{% endgeneration %}
{% else %}{% for p in m['content'] %}{% if p['type'] == 'image' %}<image>{% else %}{{ p['text'] }}{% endif %}\
{% endfor %}<|im_end|>
{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
VICUNA = """{% for m in messages %}{{ m['role'] | upper }}: {% for p in m['content'] %}\
{% if p['type'] == 'image' %}<image>
{% else %}{{ p["text"] }}{% endif %}{% endfor %} {% endfor %}\
{% if add_generation_prompt %}ASSISTANT:{% endif %}"""
TURNS = (("<image>\nWhat colour?", "A deep red."), ("And the shape?", "Round, I think."))


def processor_with(template: str | None) -> LlavaProcessor:
    processor = nano.build_processor(scene_count=50)
    if template is not None:
        processor.chat_template = template
    if template == QWEN:
        processor.tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    return processor


@pytest.fixture(scope="module", params=["nano", "vicuna", "qwen"])
def case(request: pytest.FixtureRequest) -> tuple[LlavaProcessor, str]:
    template = {"nano": None, "vicuna": VICUNA, "qwen": QWEN}[request.param]
    return processor_with(template), {"qwen": "<|im_end|>"}.get(request.param, "</s>")


def picture(color: str = "red") -> Image.Image:
    return Image.new("RGB", (60, 60), color)


def test_labels_are_the_answers_and_their_end_marks(case: tuple[LlavaProcessor, str]) -> None:
    processor, end = case
    encoded = encode(processor, render(processor, Conversation("x", (), TURNS)), [picture()])
    for number, (_, answer) in enumerate(TURNS):
        ids = [i for i, of in zip(encoded.input_ids, encoded.answer_of, strict=True) if of == number]
        assert processor.tokenizer.decode(ids).strip() == answer + end
    assert encoded.input_ids.count(processor.tokenizer.convert_tokens_to_ids("<image>")) == 144


def test_what_precedes_an_answer_is_what_inference_feeds(case: tuple[LlavaProcessor, str]) -> None:
    processor, _ = case
    encoded = encode(processor, render(processor, Conversation("x", (), TURNS[:1])), [picture()])
    content = [{"type": "image"}, {"type": "text", "text": "What colour?"}]
    prompt = processor.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
    )
    special = not prompt.startswith(processor.tokenizer.bos_token)
    inputs = processor(text=[prompt], images=[picture()], add_special_tokens=special)
    start = encoded.answer_of.index(0)
    if processor.chat_template == VICUNA:  # writes a line break that stripping the question takes
        assert encoded.input_ids[:start][-1] == inputs["input_ids"][0][-1]
    else:
        assert encoded.input_ids[:start] == list(inputs["input_ids"][0])


def test_labels_equal_the_mask_of_transformers() -> None:
    processor = processor_with(QWEN)
    messages: list[dict[str, Any]] = []
    turns = (("What colour?", "A deep red."), ("And the shape?", "Round, I think."))
    for question, answer in turns:
        messages.append({"role": "user", "content": [{"type": "text", "text": question}]})
        messages.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
    theirs = processor.tokenizer.apply_chat_template(
        messages, chat_template=QWEN, return_dict=True, return_assistant_tokens_mask=True
    )
    encoded = encode(processor, render(processor, Conversation("x", (), turns)), [])
    mask = [int(of >= 0) for of in encoded.answer_of]
    expected = theirs["assistant_masks"]
    assert encoded.input_ids == theirs["input_ids"][: len(encoded.input_ids)]
    assert mask == expected[: len(mask)]
    assert not any(expected[len(mask) :])


def test_pictures_side_by_side_are_refused_by_name() -> None:
    processor = processor_with(None)
    processor.chat_template = VICUNA.replace("<image>\n", "<image>")
    turns = (("<image><image>Which?", "The left one."),)
    with pytest.raises(BadSample, match="s9: two pictures lie side by side"):
        encode(processor, render(processor, Conversation("s9", (), turns)), [picture(), picture()])


def test_a_template_that_rewrites_history_is_refused() -> None:
    processor = processor_with("{{ messages | length }}{% for m in messages %}{{ m['role'] }}{% endfor %}")
    with pytest.raises(BadSample, match="rewrites earlier turns"):
        render(processor, Conversation("x", (), (("Hi", "Yes"), ("So", "No"))))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight entries: 2 is text alone, 4 has a broken picture, 5 none on disk, 6 two turns."""
    made = tmp_path_factory.mktemp("mix")
    entries = [entry(i, image=i != 2, turns=2 if i == 6 else 1) for i in range(8)]
    entries[7]["conversations"][1]["value"] = "long " * 40
    (made / "mix.json").write_text(json.dumps(entries))
    for i in (0, 1, 3, 6, 7):
        picture().save(made / f"{i}.png")
    (made / "4.png").write_bytes(b"no picture")
    return made


def dataset(folder: Path, **settings: Any) -> ConversationDataset:
    return ConversationDataset(Conversations(folder / "mix.json"), processor_with(None), **settings)


def test_broken_pictures_stop_with_their_id_or_are_counted(folder: Path) -> None:
    strict = dataset(folder)
    for index, says in ((4, "s4: .*4.png: broken picture"), (5, "s5: .*5.png: no such picture")):
        with pytest.raises(BadSample, match=says):
            strict[index]
    lenient = dataset(folder, on_error="skip")
    assert len(lenient) == 8
    item = lenient[4]
    assert torch.equal(item["input_ids"], lenient[6]["input_ids"])
    assert item["sample"] == 4
    assert [reason[:2] for reason in item["skipped"]] == ["s4", "s5"]


def test_only_the_last_answer_may_be_dropped_unless_all_may(folder: Path) -> None:
    for answers, expected in (("last", 1), ("all", 2)):
        item = dataset(folder, answers=answers)[6]
        runs = torch.diff(item["answer_mask"].int(), prepend=torch.zeros(1, dtype=torch.int32)).eq(1).sum()
        assert runs == expected
        assert (item["labels"] != IGNORE).sum() > 0
        assert not (item["answer_mask"] & (item["labels"] == IGNORE)).any()


def test_long_entries_are_cut_and_counted_and_never_inside_a_picture(folder: Path) -> None:
    item = dataset(folder, max_length=180)[7]
    assert len(item["input_ids"]) == 180
    assert item["truncated"] == 1
    with pytest.raises(BadSample, match="s7: no answer within 100 tokens"):
        dataset(folder, max_length=100)[7]


def test_batches_pad_on_the_right_and_keep_pictures_in_order(folder: Path) -> None:
    data = dataset(folder)
    items = [data[i] for i in (0, 2, 6)]
    batch = collate(items, pad=0)
    (group,) = batch["groups"]
    assert group["pixel_values"].shape[0] == 2
    assert group["attention_mask"].sum(-1).tolist() == [len(item["input_ids"]) for item in items]
    for row, item in enumerate(items):
        assert torch.equal(group["labels"][row][: len(item["labels"])], item["labels"])
        assert (group["labels"][row][len(item["labels"]) :] == IGNORE).all()
    assert "pixel_values" not in collate([data[2]], pad=0)["groups"][0]


def test_order_groups_by_length_and_depends_on_seed_and_epoch_alone() -> None:
    lengths = [(i * 7919) % 1000 for i in range(1003)]
    sampler = LengthGrouped(lengths, batch=10, seed=1)
    first = list(sampler)
    assert sorted(first) == list(range(1003))
    assert first == list(LengthGrouped(lengths, batch=10, seed=1))
    sampler.set_epoch(1)
    assert list(sampler) != first
    spread = [
        max(lengths[i] for i in first[start : start + 10])
        - min(lengths[i] for i in first[start : start + 10])
        for start in range(0, 1000, 10)
    ]
    assert sum(spread) / len(spread) < 60
