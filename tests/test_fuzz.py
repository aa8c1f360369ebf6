"""Whatever a file holds, reading it ends well or with the library's one line: about 2,000 drawn cases.

The cases are the same in every run; ``FUZZ=1`` draws others.
"""

from __future__ import annotations

import functools
import io
import json
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from PIL import Image, features
from transformers import LlavaProcessor

from dynamic_llava import Sparsifier, SparsityConfig
from dynamic_llava.adapter import CONFIG_FILE
from dynamic_llava.chat.asking import encode
from dynamic_llava.chat.images import MAX_ASPECT, as_rgb, open_image
from dynamic_llava.chat.prompt import chat_prompt
from dynamic_llava.checkpoints.generation import FILE, check_generation
from dynamic_llava.data.conversations import BadSample, Conversations
from dynamic_llava.data.training import ConversationDataset
from dynamic_llava.evaluation.references import references
from dynamic_llava.training import nano
from dynamic_llava.training.recipe import Recipe

MISTAKES = (ValueError, FileNotFoundError, BadSample)
IMAGE_TOKENS = 144


def fuzz(examples: int) -> Any:
    return settings(
        max_examples=examples,
        deadline=None,
        derandomize="FUZZ" not in os.environ,
        database=None,
        suppress_health_check=list(HealthCheck),
    )


@contextmanager
def only_mistakes(*named: str | Path) -> Iterator[None]:
    """Let nothing through but a mistake of the user, in one line that holds all of ``named``."""
    try:
        yield
    except Exception as error:
        message = str(error)
        assert type(error) in MISTAKES, f"{type(error).__name__}: {message}"  # noqa: PT017  # or none: as good
        assert message
        assert "\n" not in message
        assert all(str(name) in message for name in named)


@pytest.fixture(scope="module")
def room(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a picture, one that is broken, and an empty folder."""
    folder = tmp_path_factory.mktemp("fuzz")
    Image.effect_noise((60, 40), 80).convert("RGB").save(folder / "good.png")
    (folder / "broken.png").write_bytes((folder / "good.png").read_bytes()[:500])
    (folder / "folder").mkdir()
    return folder


@functools.cache
def processor() -> LlavaProcessor:
    return nano.build_processor(scene_count=20)


# What a careless program or person writes

TEXT = st.text(
    st.characters(codec=None, exclude_categories=()), max_size=12
)  # halves of surrogate pairs, too
NUMBERS = st.integers(-3, 300) | st.sampled_from([10**30, -(2**63)]) | st.floats()
PLAIN = st.none() | st.booleans() | NUMBERS | TEXT | st.sampled_from(["<image>", "0.5", "nano", "last", "\0"])
VALUES = st.recursive(
    PLAIN, lambda x: st.lists(x, max_size=3) | st.dictionaries(TEXT, x, max_size=3), max_leaves=5
)


def places(value: Any, way: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield the way to every part of plain data."""
    yield way
    if isinstance(value, dict | list):
        for key in value if isinstance(value, dict) else range(len(value)):
            yield from places(value[key], (*way, key))


@st.composite
def spoilt(draw: st.DrawFn, good: Any, values: st.SearchStrategy[Any] = VALUES) -> Any:
    """Draw a copy of ``good`` with up to three parts exchanged, taken out, or put in."""
    data = json.loads(json.dumps(good))
    for _ in range(draw(st.integers(0, 3))):
        way = draw(st.sampled_from(list(places(data))))
        if not way:
            if draw(st.integers(0, 9)) == 0:
                data = draw(values)
            continue
        holder = functools.reduce(lambda part, key: part[key], way[:-1], data)
        action = draw(st.sampled_from(["exchange", "exchange", "take out", "put in"]))
        if action == "exchange":
            holder[way[-1]] = draw(values)
        elif action == "take out":
            del holder[way[-1]]
        elif isinstance(holder, dict):
            holder[draw(TEXT)] = draw(values)
        else:
            holder.append(draw(values))
    return data


# Entries of training data and of questions

TURNS = [{"from": "human", "value": "<image>\nwhat?"}, {"from": "gpt", "value": "a red square"}] * 2
ENTRY = {"id": "x", "image": ["good.png", "good.png"], "conversations": TURNS}
NAMES = st.sampled_from(
    ["good.png", "broken.png", "folder", "gone.png", "", "a\0b", "n" * 300, "\ud83d", "../x"]
)
SAID = st.lists(st.sampled_from(["<image>", "what?", " ", "\n", "red", "<pad>", "</s>"]) | TEXT, max_size=5)
PARTS = VALUES | NAMES | SAID.map("".join) | st.lists(NAMES, max_size=3)


@fuzz(700)
@given(entry=spoilt(ENTRY, PARTS), max_length=st.integers(1, 500), as_lines=st.booleans())
def test_entries_of_training_data(entry: Any, max_length: int, as_lines: bool, room: Path) -> None:
    path = room / "data.json"
    path.write_text(json.dumps(entry) if as_lines else json.dumps([entry]))
    with only_mistakes():
        data = ConversationDataset(Conversations(path), processor(), max_length=max_length, positions=450)
        item = data[0]
        ids = item["input_ids"]
        assert len(ids) <= min(max_length, 450)
        pictures = (ids == processor().tokenizer.convert_tokens_to_ids("<image>")).sum()
        assert pictures == IMAGE_TOKENS * len(item.get("pixel_values", ()))
        assert (item["labels"][1:] >= 0).any()


@fuzz(150)
@given(entries=st.lists(spoilt(ENTRY, PARTS), min_size=1, max_size=4), noise=st.binary(max_size=20))
def test_a_training_that_skips_goes_on_past_any_line(entries: list[Any], noise: bytes, room: Path) -> None:
    path = room / "data.jsonl"
    lines = [json.dumps(ENTRY).encode(), *(json.dumps(entry).encode() for entry in entries)]
    path.write_bytes(b"\n".join([*lines, noise.replace(b"\n", b" "), lines[0]]))
    conversations = Conversations(path, on_error="skip")
    data = ConversationDataset(conversations, processor(), on_error="skip")
    for index in range(len(data)):
        item = data[index]
        assert all("\n" not in reason for reason in item["skipped"])


@fuzz(150)
@given(
    sample=spoilt({"id": "x", "image": "good.png", "question": "what?", "answer": "red"}, PARTS)
    | spoilt(ENTRY | {"image": "good.png"}, PARTS)
)
def test_questions_with_references(sample: Any, room: Path) -> None:
    path = room / "questions.json"
    path.write_text(json.dumps([sample]))
    with only_mistakes(path):
        for question in references(path, room):
            assert chat_prompt(processor(), question.text, 1, question.earlier)


@fuzz(150)
@given(prompt=SAID.map("".join), pictures=st.integers(0, 3))
def test_prompts(prompt: str, pictures: int) -> None:
    with only_mistakes():
        text = chat_prompt(processor(), prompt, pictures)
        images = [Image.new("RGB", (8, 8))] * pictures
        ids = encode(processor(), [text], images)["input_ids"]
        assert (ids == processor().image_token_id).sum() == IMAGE_TOKENS * pictures


# Pictures

MODES = [
    "1",
    "L",
    "P",
    "RGB",
    "RGBA",
    "CMYK",
    "YCbCr",
    "LAB",
    "HSV",
    "I",
    "F",
    "LA",
    "PA",
    "RGBX",
    "RGBa",
    "La",
]
MODES += ["I;16", "I;16L", "I;16B", "I;16N"]
FORMATS = [
    "PNG",
    "JPEG",
    "GIF",
    "TIFF",
    "WEBP",
    "BMP",
    "PPM",
    "TGA",
    "ICO",
    "PCX",
    "SGI",
    "DIB",
    "IM",
    "SPIDER",
]
FORMATS += [name for name, module in (("JPEG2000", "jpg_2000"), ("AVIF", "avif")) if features.check(module)]


def noise(mode: str, size: tuple[int, int], seed: int) -> Image.Image:
    """Make a picture of any mode from bytes."""
    width, height = size
    bands = (
        4 if mode in ("I", "F") else 2 if mode.startswith("I;") else len(Image.new(mode, (1, 1)).getbands())
    )
    length = math.ceil(width / 8) * height if mode == "1" else width * height * bands
    length = width * height * 4 if mode in ("RGBX", "RGBa") else length
    generator = torch.Generator().manual_seed(seed)
    data = torch.randint(0, 256, (length,), generator=generator, dtype=torch.uint8).numpy().tobytes()
    return Image.frombytes(mode, size, data)


@fuzz(450)
@given(
    mode=st.sampled_from(MODES),
    kind=st.sampled_from(FORMATS),
    size=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    seed=st.integers(0, 2**32),
    orientation=st.integers(0, 9),
    cut=st.none() | st.integers(0, 2000),
    changes=st.lists(st.tuples(st.integers(0, 4000), st.integers(0, 255)), max_size=3),
)
def test_pictures_of_all_modes_and_formats(
    mode: str,
    kind: str,
    size: tuple[int, int],
    seed: int,
    orientation: int,
    cut: int | None,
    changes: list[tuple[int, int]],
    room: Path,
) -> None:
    image = noise(mode, size, seed)
    with only_mistakes():
        held = as_rgb(image)
        assert (held.mode, held.size) == ("RGB", size)
        assert as_rgb(held).tobytes() == held.tobytes()
    file, exif = io.BytesIO(), Image.Exif()
    exif[0x0112] = orientation
    try:
        image.save(file, format=kind, **({"exif": exif} if kind in ("PNG", "JPEG", "WEBP", "TIFF") else {}))
    except (OSError, ValueError, KeyError, TypeError):
        assume(False)  # a format that does not know the mode
    content = bytearray(file.getvalue()[:cut])
    for place, value in changes:
        if place < len(content):
            content[place] = value
    path = room / "picture"
    path.write_bytes(content)
    with only_mistakes(path):
        opened = open_image(path)
        assert opened.mode == "RGB"
        assert 1 <= max(opened.size) <= MAX_ASPECT * min(opened.size)
        if seed % 4 == 0:
            assert_same_pixels(path, opened)


def assert_same_pixels(path: Path, opened: Image.Image) -> None:
    """What is trained on is what is asked about, from the file and from what Pillow makes of it."""
    data = path.with_name("one.json")
    data.write_text(json.dumps([ENTRY | {"image": path.name, "conversations": TURNS[:2]}]))
    trained = ConversationDataset(Conversations(data), processor())[0]["pixel_values"]
    prompt = chat_prompt(processor(), "what?", 1)
    with Image.open(path) as held:
        for asked in (opened, held):
            assert torch.equal(encode(processor(), [prompt], [asked])["pixel_values"], trained)


# Recipes and configs

RECIPES = [
    yaml.safe_load(path.read_text())
    for path in sorted((Path(__file__).parents[1] / "recipes").glob("*.yaml"))
]
YAML_VALUES = VALUES | st.dates() | st.sampled_from([b"\xff", "2001-99-99", "!!x", "&a", "[", "\t"])


@fuzz(300)
@given(recipe=st.sampled_from(RECIPES).flatmap(lambda good: spoilt(good, YAML_VALUES)))
def test_recipes(recipe: Any, room: Path) -> None:
    path = room / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe, allow_unicode=False))
    with only_mistakes(path):
        Recipe.read(path)


@fuzz(100)
@given(
    text=st.lists(
        st.sampled_from(["stage", ": ", "\n", "  ", "- ", "{", "[", "&a ", "*a", "!!bool ", "? ", "'"]) | TEXT
    )
)
def test_text_as_a_recipe(text: list[str], room: Path) -> None:
    path = room / "recipe.yaml"
    path.write_bytes("".join(text).encode(errors="surrogatepass"))
    with only_mistakes(path):
        Recipe.read(path)


@pytest.fixture(scope="module")
def predictors(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("predictors")
    Sparsifier(SparsityConfig(d_model=16, nhead=2, dim_feedforward=16), 32).save_pretrained(folder)
    return folder


SPARSIFIER = SparsityConfig(d_model=16, nhead=2, dim_feedforward=16).to_dict() | {
    "hidden_size": 32, "base_model_name_or_path": "", "text_margins": [-1.0, 0.5, 2.0],
}  # fmt: skip


@fuzz(250)
@given(config=spoilt(SPARSIFIER))
def test_sparsifier_configs(config: Any, predictors: Path) -> None:
    (predictors / CONFIG_FILE).write_text(json.dumps(config))
    with only_mistakes():
        sparsifier = Sparsifier.from_pretrained(predictors)
        sparsifier.config.text_threshold  # noqa: B018
        assert SparsityConfig.from_dict(sparsifier.config.to_dict()) == sparsifier.config


GENERATION = {
    "bos_token_id": 1,
    "eos_token_id": [2, 3],
    "pad_token_id": 0,
    "max_length": 99,
    "temperature": 0.5,
}


@fuzz(150)
@given(config=spoilt(GENERATION))
def test_generation_configs(config: Any, room: Path) -> None:
    class Text:
        vocab_size = 100

    (room / FILE).write_text(json.dumps(config))
    with only_mistakes(room / FILE):
        check_generation(room, Text)
