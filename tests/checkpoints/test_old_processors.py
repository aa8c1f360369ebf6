"""Processor files as older transformers wrote them: what they leave out comes from the model's config."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import dynamic_llava
from dynamic_llava import checkpoints
from dynamic_llava.chat.asking import ask

PICTURE = Image.new("RGB", (96, 96), "red")


def read(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(path.read_text())
    return content


def without(*keys: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / "processor_config.json"
        content = read(path)
        path.write_text(json.dumps({key: value for key, value in content.items() if key not in keys}))

    return change


def preprocessor_alone(folder: Path) -> None:
    path = folder / "processor_config.json"
    (folder / "preprocessor_config.json").write_text(json.dumps(read(path)["image_processor"]))
    path.unlink()


def template_of_the_tokenizer(folder: Path) -> None:
    template = (folder / "chat_template.jinja").read_text()
    (folder / "chat_template.jinja").unlink()
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(read(path) | {"chat_template": template}))


def template_in_json(folder: Path) -> None:
    template = (folder / "chat_template.jinja").read_text()
    (folder / "chat_template.jinja").unlink()
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": template}))


def all_of_it(folder: Path) -> None:
    preprocessor_alone(folder)
    template_of_the_tokenizer(folder)


@pytest.fixture
def nano(tmp_path: Path) -> Path:
    return Path(shutil.copytree(checkpoints.resolve("nano"), tmp_path / "nano"))


@pytest.mark.parametrize(
    "change",
    [
        without("patch_size"),
        without("vision_feature_select_strategy"),
        without("num_additional_image_tokens"),
        without("patch_size", "vision_feature_select_strategy", "num_additional_image_tokens"),
        without("image_token", "processor_class"),
        preprocessor_alone,
        template_of_the_tokenizer,
        template_in_json,
        all_of_it,
    ],
)
def test_answer_as_with_the_complete_files(change: Callable[[Path], None], nano: Path) -> None:
    expected = ask(*dynamic_llava.load("nano"), "What is it?", [PICTURE], 4)  # type: ignore[arg-type]
    change(nano)
    model, processor = dynamic_llava.load(nano)
    assert processor is not None
    reply = ask(model, processor, "What is it?", [PICTURE], 4)
    assert reply.token_ids == expected.token_ids
    assert reply.text == expected.text


def test_saved_again_it_is_complete(nano: Path) -> None:
    preprocessor_alone(nano)
    checkpoints.save(*dynamic_llava.load(nano), nano.parent / "again")
    written = read(nano.parent / "again" / "processor_config.json")
    assert written["patch_size"] == 8
    assert written["num_additional_image_tokens"] == 1
    assert written["vision_feature_select_strategy"] == "default"


def test_features_of_every_token_are_counted(nano: Path) -> None:
    """With ``full`` the class token is an image token, too."""
    without("patch_size", "vision_feature_select_strategy", "num_additional_image_tokens")(nano)
    path = nano / "config.json"
    path.write_text(json.dumps(read(path) | {"vision_feature_select_strategy": "full"}))
    processor: Any = checkpoints.Source(nano).processor
    prompt = processor(text="<image>", images=[PICTURE])
    assert list(prompt["input_ids"][0]).count(processor.image_token_id) == 145
