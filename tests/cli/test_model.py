"""The model that a command asks: unknown, incomplete or broken ones end with one line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from tests.command_line import LAYERS, Command, refused
from transformers import LlavaForConditionalGeneration

from dynamic_llava.cli.model import configure


@pytest.mark.parametrize("name", ["no-such-model", "./nowhere", "owner/no such name", "owner/model", ""])
def test_unknown_checkpoint(name: str, command: Command, picture: Path) -> None:
    line = refused(command, "generate", "--image", picture, "--prompt", "what?", "--model", name)
    assert name in line


@pytest.mark.parametrize("arguments", [("demo",), ("evaluate", "--task", "scenes", "--limit", 1)])
def test_unknown_checkpoint_in_other_commands(arguments: tuple[object, ...], command: Command) -> None:
    assert "no-such-model: no such checkpoint" in refused(command, *arguments, "--model", "no-such-model")


def drop_tensor(folder: Path, name: str) -> str:
    path = folder / name
    tensors = load_file(path)
    first = min(tensors)
    save_file({key: tensor for key, tensor in tensors.items() if key != first}, path, {"format": "pt"})
    return "missing"


def reshape_tensor(folder: Path, name: str) -> str:
    path = folder / name
    tensors = load_file(path)
    first = min(tensors)
    tensors[first] = tensors[first].repeat(*[2] * tensors[first].ndim)
    save_file(tensors, path, {"format": "pt"})
    return "shape"


def truncate(folder: Path, name: str) -> str:
    path = folder / name
    path.write_bytes(path.read_bytes()[:-100])
    return str(folder)


@pytest.mark.parametrize("name", ["model.safetensors", "sparsifier.safetensors"])
@pytest.mark.parametrize("spoil", [drop_tensor, reshape_tensor, truncate])
def test_bad_tensors(
    spoil: Callable[[Path, str], str], name: str, copied: Path, command: Command, picture: Path
) -> None:
    expected = spoil(copied, name)
    line = refused(command, "generate", "--image", picture, "--prompt", "what?", "--model", copied)
    assert expected in line
    assert str(copied) in line


@pytest.mark.parametrize(
    ("setting", "value", "message"),
    [
        ("layer", 0, "layer is 0"),
        ("layer", LAYERS, f"layer is {LAYERS}: the decoder has {LAYERS} layers"),
        ("layer", LAYERS + 4, f"the decoder has {LAYERS} layers"),
        ("image_keep_rate", 0, "image_keep_rate is 0"),
        ("image_keep_rate", 1.2, "image_keep_rate is 1.2"),
        ("text_keep_rate", -1, "text_keep_rate is -1"),
        ("image_policy", "best", "image_policy is 'best'"),
        ("hidden_size", 48, "shape"),
        ("no_such_setting", 1, "no_such_setting"),
    ],
)
def test_bad_sparsifier_config(
    setting: str, value: object, message: str, copied: Path, command: Command, picture: Path
) -> None:
    path = copied / "sparsifier_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {setting: value}))
    line = refused(command, "generate", "--image", picture, "--prompt", "what?", "--model", copied)
    assert message in line


@pytest.mark.parametrize(
    ("missing", "message"),
    [
        ("config.json", "is no checkpoint"),
        ("model.safetensors", "holds no weights"),
        ("tokenizer.json", "no tokenizer or processor"),
        ("processor_config.json", "processor"),
        ("sparsifier.safetensors", "sparsifier.safetensors does not exist"),
        ("sparsifier_config.json", "sparsifier_config.json does not exist"),
        ("chat_template.jinja", "no chat template"),
    ],
)
def test_incomplete_checkpoint(
    missing: str, message: str, copied: Path, command: Command, picture: Path
) -> None:
    (copied / missing).unlink()
    line = refused(command, "generate", "--image", picture, "--prompt", "what?", "--model", copied)
    assert message in line


def test_keep_rate_of_a_dense_model(command: Command, picture: Path, checkpoint: Path) -> None:
    ask = ("generate", "--image", picture, "--prompt", "what?", "--model", checkpoint, "--dense")
    assert "answers dense" in refused(command, *ask, "--image-keep-rate", "0.5")


def test_refusal_leaves_the_model_alone(model: LlavaForConditionalGeneration) -> None:
    config = model.sparsifier.config
    with pytest.raises(ValueError, match="image_keep_rate"):
        configure(model, image_keep_rate=2.0)
    assert model.sparsifier.config is config
