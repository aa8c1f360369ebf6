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
        ("hidden_size", -5, "hidden_size is -5"),
        ("hidden_size", None, "sparsifier_config.json is no sparsifier config"),
        ("hidden_size", float("inf"), "sparsifier_config.json is no sparsifier config"),
        ("no_such_setting", 1, "no_such_setting"),
        ("text_margins", ["a", "b"], "text_margins is ('a', 'b'): it must be empty, or two or more rising"),
        ("text_margins", [None, 1], "text_margins is (None, 1)"),
        ("text_margins", [[1], [2]], "text_margins is ([1], [2])"),
        ("text_margins", [float("nan"), 1.0], "text_margins is (nan, 1.0)"),
        ("text_margins", [2, 1], "text_margins is (2, 1)"),
        ("text_margins", "ab", "text_margins is 'ab': it must be a list"),
        ("text_margins", 5, "text_margins is 5: it must be a list"),
        ("text_margins", {"a": 1}, "text_margins is {'a': 1}: it must be a list"),
        ("prompt_marker", ["x"], "prompt_marker is ('x',): it must be of whole numbers"),
        ("prompt_marker", None, "prompt_marker is None: it must be a list"),
        ("seed", "x", "seed is 'x': it must be of whole numbers"),
        ("image_keep_rate", True, "image_keep_rate is True"),
        ("image_keep_rate", "0.2", "image_keep_rate is 0.2"),
        ("layer", "2", "layer is '2'"),
        ("min_answer_length", "5", "min_answer_length is '5'"),
        ("min_answer_length", None, "min_answer_length is None"),
        ("ratio_weight", float("nan"), "ratio_weight is nan"),
        ("softmax_eps", [1], "softmax_eps is [1]"),
        ("dropped_key_bound", "x", "dropped_key_bound is 'x'"),
        ("image_policy", ["learned"], "image_policy is ['learned']"),
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


JSON_FILES = (
    "config.json", "generation_config.json", "processor_config.json", "sparsifier_config.json",
    "tokenizer.json", "tokenizer_config.json",
)  # fmt: skip


@pytest.mark.parametrize("name", JSON_FILES)
@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"a": ', "not JSON"),
        ("", "not JSON"),
        ("[1, 2]", "holds list, it must be an object"),
        ("null", "holds NoneType, it must be an object"),
        ("[" * 100_000, "lists or objects lie too deep in each other"),
        (b'{"a": "\xe9"}', "not UTF-8 text"),
        ('{"layer": ' + "9" * 5000 + "}", "digits"),
    ],
    ids=lambda value: str(value)[:12],
)
def test_broken_json(
    name: str, content: str | bytes, message: str, copied: Path, command: Command, picture: Path
) -> None:
    path = copied / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    line = refused(command, "generate", "--image", picture, "--prompt", "what?", "--model", copied)
    assert f"{path}: " in line
    assert message in line


@pytest.mark.parametrize("name", [*JSON_FILES, "model.safetensors", "sparsifier.safetensors"])
def test_folder_in_the_place_of_a_file(name: str, copied: Path, command: Command, picture: Path) -> None:
    (copied / name).unlink()
    (copied / name).mkdir()
    line = refused(command, "generate", "--image", picture, "--prompt", "what?", "--model", copied)
    assert str(copied) in line


BAD_TOKENS = [
    ("eos_token_id", "</s>"), ("eos_token_id", [2, "x"]), ("eos_token_id", [[2]]), ("eos_token_id", {}),
    ("eos_token_id", 1.5), ("eos_token_id", True), ("eos_token_id", -1), ("eos_token_id", 10**9),
    ("pad_token_id", "<pad>"), ("pad_token_id", [0]), ("bos_token_id", 10**9),
]  # fmt: skip


@pytest.mark.parametrize(
    ("setting", "value", "message"),
    [
        ("eos_token_id", "</s>", "eos_token_id is '</s>': it must be null, or a token id from 0 to "),
        *(
            (setting, value, f"{setting} is {value!r}: it must be null, or a")
            for setting, value in BAD_TOKENS
        ),
        ("max_new_tokens", "9", "max_new_tokens is '9': it must be a number"),
        ("temperature", "hot", "temperature is 'hot'"),
        ("no_repeat_ngram_size", "2", "no_repeat_ngram_size is '2'"),
        ("watermarking_config", 3, "no config of a generation"),
    ],
)
def test_bad_generation_config(
    setting: str, value: object, message: str, copied: Path, command: Command, picture: Path
) -> None:
    path = copied / "generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {setting: value}))
    line = refused(command, "generate", "--image", picture, "--prompt", "what?", "--model", copied)
    assert str(path) in line
    assert message in line


@pytest.mark.parametrize(("setting", "value"), BAD_TOKENS)
def test_bad_tokens_where_there_is_no_generation_config(
    setting: str, value: object, copied: Path, command: Command, picture: Path
) -> None:
    (copied / "generation_config.json").unlink()
    path = copied / "config.json"
    values = json.loads(path.read_text())
    values["text_config"][setting] = value
    path.write_text(json.dumps(values))
    line = refused(command, "generate", "--image", picture, "--prompt", "what?", "--model", copied)
    assert str(path) in line


@pytest.mark.parametrize("tokens", [None, 2, [2, 3], []])
def test_good_end_tokens(tokens: object, copied: Path, command: Command, picture: Path) -> None:
    path = copied / "generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"eos_token_id": tokens, "pad_token_id": -1}))
    ask = ("generate", "--image", picture, "--prompt", "what?", "--max-new-tokens", 2, "--model", copied)
    assert command(*ask).code == 0


@pytest.mark.parametrize(
    ("setting", "value", "message"),
    [
        ("model_type", ["llava"], "model_type is ['llava'], it must be a name"),
        ("transformers_weights", ["x"], "transformers_weights is ['x'], it must name a file"),
        ("projector_hidden_act", "magic", "the model cannot be read: KeyError: 'magic'"),
        ("vision_feature_layer", "x", "is no config of a "),
    ],
)
def test_bad_config(
    setting: str, value: object, message: str, copied: Path, command: Command, picture: Path
) -> None:
    path = copied / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {setting: value}))
    line = refused(command, "generate", "--image", picture, "--prompt", "what?", "--model", copied)
    assert message in line


@pytest.mark.parametrize(
    ("setting", "value", "message"),
    [
        ("processor_class", "Magic", "transformers finds no processor"),
        ("patch_size", "x", "the checkpoint's processor fails on this prompt (TypeError"),
        ("image_processor", {"size": "x"}, "the processor cannot be read"),
    ],
)
def test_bad_processor_config(
    setting: str, value: object, message: str, copied: Path, command: Command, picture: Path
) -> None:
    path = copied / "processor_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {setting: value}))
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
