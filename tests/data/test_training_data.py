"""Labels are exact to the token; batches, order and losses of data are what they should be."""

from __future__ import annotations

import functools
import json
import os
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
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


@functools.cache
def plain_processor() -> LlavaProcessor:
    """A processor that tests do not change."""
    return processor_with(None)


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


def test_pictures_side_by_side_are_told_apart() -> None:
    processor = processor_with(None)
    processor.chat_template = VICUNA.replace("<image>\n", "<image>")
    turns = (("<image><image>Which?", "The left one."),)
    encoded = encode(processor, render(processor, Conversation("s9", (), turns)), [picture(), picture()])
    first = encoded.picture_of.index(0)
    assert encoded.picture_of[first : first + 288] == [0] * 144 + [1] * 144


class Silent:
    """A processor that does not say where it wrote its pictures."""

    def __init__(self) -> None:
        self.inner = plain_processor()
        self.tokenizer = self.inner.tokenizer

    def __call__(self, **given: Any) -> dict[str, Any]:
        made = dict(self.inner(**given))
        del made["text_replacement_offsets"]
        return made


def test_a_processor_that_does_not_say_where_a_picture_is_is_refused() -> None:
    rendered = render(plain_processor(), Conversation("s9", (), (("<image>Which?", "This."),)))
    with pytest.raises(
        BadSample, match="s9: Silent tells of 0 places where it wrote a picture, and there are 1"
    ):
        encode(Silent(), rendered, [picture()])  # type: ignore[arg-type]


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
    return ConversationDataset(Conversations(folder / "mix.json"), plain_processor(), **settings)


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


@pytest.mark.parametrize("max_length", range(160, 320, 11))
def test_a_cut_takes_later_pictures_whole_with_all_behind_them(tmp_path: Path, max_length: int) -> None:
    turns = [turn for _ in "ab" for turn in entry(0)["conversations"]]
    (tmp_path / "mix.json").write_text(
        json.dumps([entry(0) | {"image": ["0.png"] * 2, "conversations": turns}])
    )
    picture().save(tmp_path / "0.png")
    whole = dataset(tmp_path)[0]
    item = dataset(tmp_path, max_length=max_length)[0]
    length = len(item["input_ids"])
    assert length <= max_length
    assert torch.equal(item["input_ids"], whole["input_ids"][:length])
    mark = plain_processor().tokenizer.convert_tokens_to_ids("<image>")
    pictures = len(item["pixel_values"])
    assert (item["input_ids"] == mark).sum() == 144 * pictures
    lost = [] if pictures == 2 else [f"s0: cut to {length} tokens, before picture 2 of 2"]
    assert item["cut"] == collate([item], pad=0)["cut"] == lost
    assert item["truncated"] == (len(whole["input_ids"]) > max_length)
    assert length == min(max_length, len(whole["input_ids"])) or pictures == 1


@pytest.mark.parametrize("max_length", [160, 2048])
def test_what_the_model_has_no_positions_for_is_broken(folder: Path, max_length: int) -> None:
    settings = {"positions": 170, "max_length": max_length}
    if max_length < 170:
        assert len(dataset(folder, **settings)[7]["input_ids"]) == max_length
        return
    with pytest.raises(BadSample, match=r"^s7: .* the model's 170 positions; .* let max_length cut it"):
        dataset(folder, **settings)[7]
    skipped = dataset(folder, on_error="skip", **settings)[7]["skipped"]
    assert [reason[:2] for reason in skipped] == ["s7"]


def fifo(path: Path) -> None:
    os.mkfifo(path)


def truncated(path: Path) -> None:
    noise_HWC = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise_HWC).save(path, format="JPEG")
    path.write_bytes(path.read_bytes()[:1500])


def without_pixels(path: Path) -> None:
    header = b"BM" + struct.pack("<IHHI", 58, 0, 0, 54)
    path.write_bytes(header + struct.pack("<IiiHHIIiiII", 40, 0, 8, 1, 24, 0, 4, 0, 0, 0, 0) + bytes(4))


def bomb(path: Path) -> None:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 30000, 30000, 8, 2, 0, 0, 0))
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND", b"")
    )


def loop(path: Path) -> None:
    path.symlink_to(path)


@pytest.mark.parametrize("make", [Path.mkdir, Path.touch, fifo, truncated, without_pixels, bomb, loop])
def test_no_picture_ends_a_training_that_skips(make: Callable[[Path], None], tmp_path: Path) -> None:
    make(tmp_path / "0.png")
    picture().save(tmp_path / "1.png")
    (tmp_path / "mix.json").write_text(json.dumps([entry(0), entry(1)]))
    (reason,) = dataset(tmp_path, on_error="skip")[0]["skipped"]
    assert reason.startswith(f"s0: {tmp_path / '0.png'}: ")
    assert "\n" not in reason
    with pytest.raises(BadSample, match=r"^s0: "):
        dataset(tmp_path)[0]


@pytest.mark.parametrize("name", ["", "a\0b", "\ud83d.png", "n" * 300, "../" * 2000, "0.png/0.png"])
def test_no_name_of_a_picture_ends_a_training_that_skips(name: str, tmp_path: Path) -> None:
    picture().save(tmp_path / "1.png")
    (tmp_path / "mix.json").write_text(json.dumps([entry(0) | {"image": [name]}, entry(1)]))
    (reason,) = dataset(tmp_path, on_error="skip")[0]["skipped"]
    assert reason.startswith("s0: ")


def test_whatever_a_processor_raises_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = dataset(folder)

    def broken(*_: Any, **__: Any) -> None:
        raise ZeroDivisionError("by zero\nand more")

    monkeypatch.setattr(data.processor.image_processor, "preprocess", broken)
    with pytest.raises(BadSample, match=r"^s0: cannot be encoded: ZeroDivisionError: by zero$"):
        data[0]


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
