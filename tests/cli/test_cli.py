"""The command line: help, answers, JSON, and one line with exit code 2 for every bad input."""

from __future__ import annotations

import io
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image
from safetensors.torch import load_file, save_file
from tests.chat.test_images import BAD_PICTURES
from tests.command_line import LAYERS, Command
from transformers import LlavaForConditionalGeneration

from dynamic_llava import cli

COMMANDS = ("demo", "generate", "evaluate", "train", "convert", "verify", "flops", "bench")
WORDS = 8


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    path = tmp_path / "picture.png"
    Image.new("RGB", (40, 30), (0, 0, 255)).save(path)
    return path


@pytest.fixture
def copied(checkpoint: Path, tmp_path: Path) -> Path:
    """A copy of the checkpoint, to be spoilt."""
    return shutil.copytree(checkpoint, tmp_path / "copied")


def refused(command: Command, *arguments: object) -> str:
    """Run a command that must be refused; return its one line."""
    outcome = command(*arguments)
    assert outcome.code == 2
    assert outcome.stdout == ""
    assert outcome.stderr.startswith("error: ")
    assert outcome.stderr.count("\n") == 1
    assert "Traceback" not in outcome.stderr
    return outcome.stderr


# Help


def test_installed_program_prints_help() -> None:
    program = Path(sys.executable).with_name("dynamic-llava")
    if not program.exists():
        pytest.skip("the package is not installed, so there is no dynamic-llava program")
    done = subprocess.run([program, "--help"], capture_output=True, text=True, check=True, timeout=60)
    assert all(name in done.stdout for name in COMMANDS)
    assert done.stderr == ""


def test_help_does_not_wait_for_torch() -> None:
    code = (
        "import sys\nfrom dynamic_llava.cli import main\nsys.argv = ['dynamic-llava', '--help']\n"
        "try:\n    main()\nexcept SystemExit:\n    pass\nprint('torch' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout.splitlines()[-1] == "False"


@pytest.mark.parametrize("name", COMMANDS)
def test_help_has_an_example(name: str, command: Command) -> None:
    outcome = command(name, "--help")
    assert outcome.code == 0
    assert f"Example: dynamic-llava {name}" in outcome.stdout


# Answers


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


@pytest.mark.parametrize(("option", "policy"), [("image", "fastv"), ("text", "h2o"), ("text", "streaming")])
def test_policies(option: str, policy: str, command: Command, picture: Path, checkpoint: Path) -> None:
    ask = ("generate", "--image", picture, "--prompt", "what?", "--max-new-tokens", 11, "--json")
    answer = command(
        *ask, "--model", checkpoint, f"--{option}-policy", policy, "--text-keep-rate", "0.3"
    ).json()
    assert answer["output_tokens_kept"] == (3 if option == "text" else answer["output_tokens_kept"])
    line = refused(command, *ask, "--model", checkpoint, f"--{option}-policy", "magic")
    assert f"{option}_policy is 'magic': choose one of" in line


def test_smaller_pictures(command: Command, picture: Path, checkpoint: Path) -> None:
    ask = ("generate", "--image", picture, "--prompt", "what?", "--max-new-tokens", 2, "--json")
    answer = command(*ask, "--model", checkpoint, "--downsample", "0.2", "--image-keep-rate", "1").json()
    assert answer["image_tokens"] == 25
    assert "keep rate" in refused(command, *ask, "--model", checkpoint, "--downsample", "2")


def test_two_pictures(command: Command, picture: Path, checkpoint: Path) -> None:
    ask = ("generate", "--image", picture, "--image", picture, "--prompt", "same?", "--max-new-tokens", 2)
    assert command(*ask, "--json", "--model", checkpoint).json()["image_tokens"] == 288


def test_interrupt(command: Command, picture: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(source: str) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli.model, "load", interrupted)
    outcome = command("generate", "--image", picture, "--prompt", "what?")
    assert (outcome.code, outcome.stdout, outcome.stderr) == (130, "", "interrupted\n")


def test_traceback_on_request(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        sys, "argv", ["dynamic-llava", "--traceback", "generate", "--image", "no.png", "--prompt", "what?"]
    )
    with pytest.raises(FileNotFoundError, match=r"no\.png"):
        cli.main()


# Bad input


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


def test_keep_rate_of_a_dense_model(command: Command, picture: Path, checkpoint: Path) -> None:
    ask = ("generate", "--image", picture, "--prompt", "what?", "--model", checkpoint, "--dense")
    assert "answers dense" in refused(command, *ask, "--image-keep-rate", "0.5")


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


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("evaluate", "--task", "riddles"), "riddles"),
        (("evaluate",), "--task"),
        (("evaluate", "--task", "scenes", "--limit", "0"), "--limit"),
        (("evaluate", "--task", "scenes", "--batch-size", "0"), "--batch-size"),
        (("generate", "--prompt", "what?"), "--image"),
        (("generate", "--image", "a.png"), "--prompt"),
        (("generate", "--image", "a.png", "--prompt", "what?", "--max-new-tokens", "0"), "--max-new-tokens"),
        (("generate", "--image", "a.png", "--prompt", "what?", "--wrong"), "--wrong"),
        (("train", "no-such-recipe.yaml"), "no-such-recipe.yaml"),
        (("train",), "recipe"),
        (("paint",), "paint"),
        (("--wrong",), "--wrong"),
        ((), "command"),
    ],
)
def test_bad_arguments(arguments: tuple[str, ...], message: str, command: Command) -> None:
    line = refused(command, *arguments)
    assert message in line


def test_demo_of_a_model_without_sparsifier(command: Command, stock_checkpoint: Path, tmp_path: Path) -> None:
    line = refused(command, "demo", "--model", stock_checkpoint, "--out", tmp_path / "out")
    assert "no sparsifier" in line
    assert not (tmp_path / "out").exists()


def test_demo_out_is_a_file(command: Command, checkpoint: Path, picture: Path) -> None:
    before = picture.read_bytes()
    assert str(picture) in refused(command, "demo", "--model", checkpoint, "--out", picture)
    assert picture.read_bytes() == before


def test_refusal_leaves_the_model_alone(model: LlavaForConditionalGeneration) -> None:
    config = model.sparsifier.config
    with pytest.raises(ValueError, match="image_keep_rate"):
        cli.model.configure(model, image_keep_rate=2.0)
    assert model.sparsifier.config is config
