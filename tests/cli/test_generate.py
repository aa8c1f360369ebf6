"""``dynamic-llava generate``: answers, JSON, and one line for every bad picture, prompt and option."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.chat.test_images import BAD_PICTURES
from tests.command_line import Command, refused

from dynamic_llava import methods, photo
from dynamic_llava.chat import images
from dynamic_llava.checkpoints import source

WORDS = 8


def test_generate_prints_the_answer(command: Command, picture: Path, checkpoint: Path) -> None:
    question = ("generate", "--image", picture, "--prompt", "what is it?", "--model", checkpoint)
    answer = command(*question, "--max-new-tokens", WORDS, "--json").json()
    spoken = command(*question, "--max-new-tokens", WORDS)
    assert spoken.code == 0
    assert spoken.stdout.strip() == answer["answer"]
    assert len(answer["output_token_ids"]) == WORDS


def test_generate_streams(
    command: Command, picture: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Recorder(io.StringIO):
        def write(self, text: str) -> int:
            writes.append(text)
            return super().write(text)

    writes: list[str] = []
    monkeypatch.setattr(sys, "stdout", Recorder())
    command("generate", "--image", picture, "--prompt", "?", "--model", checkpoint, "--max-new-tokens", 40)
    assert sum(bool(text.strip()) for text in writes) > 2


def test_generate_json(command: Command, picture: Path, checkpoint: Path, stock_checkpoint: Path) -> None:
    ask = (
        "generate",
        "--image",
        picture,
        "--prompt",
        "what?",
        "--max-new-tokens",
        WORDS,
        "--json",
        "--model",
    )
    sparse, dense, stock = (
        command(*ask, *rest) for rest in ((checkpoint,), (checkpoint, "--dense"), (stock_checkpoint,))
    )
    for outcome in (sparse, dense, stock):
        assert outcome.code == 0
        assert outcome.stdout.count("\n") == 1
    content = sparse.json()
    assert content["image_tokens"] == 144
    assert content["image_tokens_kept"] == 28
    assert content["output_tokens"] == WORDS - 1
    assert content["kv_bytes"] < content["kv_bytes_dense"]
    assert dense.json() == stock.json()
    assert dense.json().keys() == {"answer", "output_token_ids"}
    assert "has no sparsifier, so it answers dense" in stock.stderr
    assert "note" not in dense.stderr


def test_image_keep_rate(command: Command, picture: Path, checkpoint: Path) -> None:
    ask = ("generate", "--image", picture, "--prompt", "what?", "--max-new-tokens", 2, "--json")
    outcome = command(*ask, "--model", checkpoint, "--image-keep-rate", "0.5")
    assert outcome.json()["image_tokens_kept"] == 72


OPTIONS = (("image", "image"), ("text", "output"))


@pytest.mark.parametrize(
    ("option", "policy"), [(option, name) for option, kind in OPTIONS for name in methods.names(kind)]
)
def test_policies(option: str, policy: str, command: Command, picture: Path, checkpoint: Path) -> None:
    ask = ("generate", "--image", picture, "--prompt", "what?", "--max-new-tokens", 11, "--json")
    answer = command(
        *ask, "--model", checkpoint, f"--{option}-policy", policy, "--text-keep-rate", "0.3"
    ).json()
    if methods.find(option if option == "image" else "output", policy).needs_predictor:
        assert answer["output_tokens_kept"] <= 10
    else:
        assert answer["output_tokens_kept"] == {"random": 4}.get(policy, 3) or option == "image"
    line = refused(command, *ask, "--model", checkpoint, f"--{option}-policy", "magic")
    assert f"{option}_policy is 'magic': choose one of" in line


def test_smaller_pictures(command: Command, picture: Path, checkpoint: Path) -> None:
    ask = ("generate", "--image", picture, "--prompt", "what?", "--max-new-tokens", 2, "--json")
    answer = command(*ask, "--model", checkpoint, "--downsample", "0.2", "--image-keep-rate", "1").json()
    assert answer["image_tokens"] == 25
    assert "keep rate" in refused(command, *ask, "--model", checkpoint, "--downsample", "2")


def test_bundled_picture(
    command: Command, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    ask = (
        "generate",
        "--image",
        "scene-1",
        "--prompt",
        "what?",
        "--max-new-tokens",
        2,
        "--model",
        checkpoint,
    )
    assert command(*ask).code == 0
    (tmp_path / "scene-1").touch()  # a file of that name comes first
    assert "scene-1: the picture file is empty" in refused(command, *ask)


@pytest.mark.parametrize("installed", [True, False])
def test_photo_answers_about_photographs_where_it_is_installed(
    installed: bool,
    command: Command,
    picture: Path,
    checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(photo, "is_installed", lambda: installed)
    asked = []
    for name in ("nano", "photo"):
        monkeypatch.setitem(source.OWN, name, lambda name=name: asked.append(name) or checkpoint)
    drawn = images.bundled()["scene-1"]
    said = {}
    for image in ("scene-1", drawn, "coffee", picture):
        ask = ("generate", "--image", image, "--prompt", "what?", "--max-new-tokens", 2, "--json")
        outcome = command(*ask)
        assert (outcome.code, outcome.stdout.count("\n")) == (0, 1)
        said[image] = outcome.stderr
    model = "photo" if installed else "nano"
    assert list(dict.fromkeys(asked)) == ["nano", model] if installed else {*asked} == {"nano"}
    assert said["scene-1"] == said[drawn] == ""
    assert said["coffee"] == said[picture]
    assert said["coffee"].startswith(f"note: {model} answered, ")
    assert command(*ask, "--model", checkpoint).stderr == ""


def test_two_pictures(command: Command, picture: Path, checkpoint: Path) -> None:
    ask = ("generate", "--image", picture, "--image", picture, "--prompt", "same?", "--max-new-tokens", 2)
    assert command(*ask, "--json", "--model", checkpoint).json()["image_tokens"] == 288


@pytest.mark.parametrize(("make", "kind", "message"), BAD_PICTURES)
def test_bad_picture(
    make: Callable[[Path], Path], kind: type[Exception], message: str, tmp_path: Path, command: Command
) -> None:
    path = make(tmp_path)
    line = refused(command, "generate", "--image", path, "--prompt", "what is it?", "--model", tmp_path)
    assert str(path) in line
    assert message in line


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("<image> <image> what?", "2 <image> placeholders for 1 pictures"),
        ("", "the prompt is empty"),
        ("word " * 3000, "tokens, those of pictures included, are too many for the model's 2,048 positions"),
        ("caf\udce9?", "the text is not valid Unicode: half a surrogate pair, or bytes that are not UTF-8"),
    ],
)
def test_bad_prompt(prompt: str, message: str, command: Command, picture: Path, checkpoint: Path) -> None:
    assert message in refused(
        command, "generate", "--image", picture, "--prompt", prompt, "--model", checkpoint
    )


def test_fewer_placeholders_than_pictures(command: Command, picture: Path, checkpoint: Path) -> None:
    ask = ("generate", "--image", picture, "--image", picture, "--prompt", "<image> what?")
    assert "1 <image> placeholders for 2 pictures" in refused(command, *ask, "--model", checkpoint)


@pytest.mark.parametrize("rate", ["0", "-0.5", "1.5", "nan", "inf"])
def test_bad_keep_rate(rate: str, command: Command, picture: Path, checkpoint: Path) -> None:
    ask = ("generate", "--image", picture, "--prompt", "what?", "--model", checkpoint)
    line = refused(command, *ask, "--image-keep-rate", rate)
    assert "image_keep_rate" in line
    assert "greater than 0 and at most 1" in line


def test_long_answer(command: Command, picture: Path, checkpoint: Path) -> None:
    ask = ("generate", "--image", picture, "--prompt", "what?", "--model", checkpoint)
    assert "ask for at most 1," in refused(command, *ask, "--max-new-tokens", 10**30)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{% for", "TemplateSyntaxError: "),
        ("{{ messages[9]['role'] }}", "UndefinedError: list object has no element 9"),
        ("{{ raise_exception('no system prompt') }}", "TemplateError: no system prompt"),
        ("{{ messages + 3 }}", "TypeError: "),
        ("{% macro a() %}{{ a() }}{% endmacro %}{{ a() }}", "RecursionError: "),
    ],
)
def test_broken_chat_template(
    template: str, message: str, command: Command, picture: Path, copied: Path
) -> None:
    (copied / "chat_template.jinja").write_text(template)
    line = refused(command, "generate", "--image", picture, "--prompt", "what?", "--model", copied)
    assert f"the checkpoint's chat template cannot write this prompt ({message}" in line
