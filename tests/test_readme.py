"""What the README says holds: code runs, commands and files exist, numbers stand in result files."""

import json
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.main import get_command

from dynamic_llava.cli import app

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
DOCUMENTS = [
    ROOT / "README.md",
    *sorted((ROOT / "docs").glob("*.md")),
    *sorted((ROOT / "evidence").glob("*.md")),
]
TEXTS = {path: path.read_text(encoding="utf-8") for path in DOCUMENTS}
COMMANDS = sorted({c for text in TEXTS.values() for c in re.findall(r"^\$ (.+)$", text, re.MULTILINE)})
RUNNABLE = re.findall(r"<!-- run -->\n```console\n\$ (.+)\n```", README)
SOURCES = "src/dynamic_llava"


LAUNCHERS = ("accelerate launch ", "lmms-eval ")


def python_blocks(path: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", TEXTS[ROOT / path], re.DOTALL | re.MULTILINE)


def test_python_blocks_run(tmp_path: Path) -> None:
    """One after the other, as a reader would paste them, in an empty folder."""
    blocks = [*python_blocks("README.md"), *python_blocks("docs/performance.md")]
    (tmp_path / "readme.py").write_text("\n".join(blocks), encoding="utf-8")
    run = subprocess.run(
        [sys.executable, "readme.py"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    assert (tmp_path / "my-sparsifier").is_dir()


def test_python_blocks_of_training_run(tmp_path: Path) -> None:
    pytest.importorskip("peft")
    (tmp_path / "training.py").write_text("\n".join(python_blocks("docs/training.md")), encoding="utf-8")
    run = subprocess.run(
        [sys.executable, "training.py"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    assert (tmp_path / "my-lora" / "adapter_model.safetensors").is_file()
    assert (tmp_path / "my-sparsifier" / "sparsifier.safetensors").is_file()


@pytest.mark.parametrize("command", RUNNABLE)
def test_runnable_commands_run(command: str) -> None:
    program, *arguments = shlex.split(command)
    assert program == "dynamic-llava"
    module = [sys.executable, "-c", "from dynamic_llava.cli import main; main()"]
    run = subprocess.run([*module, *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert json.loads(run.stdout.splitlines()[-1])


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_and_options_exist(command: str) -> None:
    program, name, *arguments = shlex.split(command)
    if program == "make":
        assert re.search(rf"^{name}:", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    elif program == "dynamic-llava":
        known = get_command(app).commands[name].params
        options = {option for parameter in known for option in parameter.opts}
        assert {argument for argument in arguments if argument.startswith("--")} <= options
    else:
        others = (
            "pip install ",
            "python -m evidence.",
            "python -m vllm.",
            "python -c ",
            "python examples/",
            "accelerate launch ",
            "lmms-eval ",
            "hf ",
            "vllm bench ",
            "cp ",
            "wget ",
            "unzip ",
        )
        assert command.startswith(others)
    ours = [argument for argument in arguments if argument.startswith(("recipes/", "examples/"))]
    assert all((ROOT / path).exists() for path in ours)


@pytest.mark.parametrize("command", [command for command in COMMANDS if command.startswith("dynamic-llava ")])
def test_commands_are_parsed(command: str) -> None:
    """All of their arguments have the right names, numbers and kinds; nothing is run."""
    _, name, *arguments = shlex.split(command)
    get_command(app).commands[name].make_context(name, arguments)


def test_own_model_from_the_first_command_to_the_last(tmp_path: Path) -> None:
    """The page's Python runs, on nano's predictors and without a hub."""
    folder = tmp_path / "runs" / "llava-1.5-7b-predictors" / "model"
    prelude = f"""
import dynamic_llava
from unittest import mock
dynamic_llava.load_model("nano").sparsifier.save_pretrained({str(folder)!r})
api = mock.patch("dynamic_llava.adapter.HfApi").start()
"""
    checks = """
assert model.name_or_path == "nano"
assert api.return_value.upload_folder.call_args.kwargs["repo_id"] == "you/llava-1.5-7b-predictors"
"""
    blocks = python_blocks("docs/your-own-model.md")
    (tmp_path / "own.py").write_text("\n".join([prelude, *blocks, checks]), encoding="utf-8")
    run = subprocess.run(
        [sys.executable, "own.py"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr


def test_command_table_is_complete() -> None:
    assert set(re.findall(r"^\| `dynamic-llava (\w+)`", README, re.MULTILINE)) == set(
        get_command(app).commands
    )


def test_links_lead_somewhere() -> None:
    links = re.findall(r"\]\((?!https?:|#)([^)#]+)", README)
    assert [link for link in links if not (ROOT / link).exists()] == []


def test_file_map_names_every_module_and_only_those() -> None:
    table = README.partition("## File map")[2].partition("## ")[0]
    cells = re.findall(r"^\| (`.*?) \|", table, re.MULTILINE)
    mapped = {path for cell in cells for path in _expand(re.findall(r"`([^`]+)`", cell))}
    assert [path for path in mapped if not (ROOT / path).exists()] == []
    present = {path for path in (ROOT / SOURCES).iterdir() if not path.name.startswith("_")}
    unnamed = {path.relative_to(ROOT).as_posix() for path in present} - {path.rstrip("/") for path in mapped}
    assert unnamed == {f"{SOURCES}/py.typed"}


def _expand(paths: list[str]) -> Iterator[str]:
    """A cell's later paths leave out the folder of its first one."""
    first, *others = paths
    yield first
    folder = first.rstrip("/").rpartition("/")[0]
    yield from (f"{folder}/{other}" for other in others)


@pytest.mark.parametrize(
    "row", [row for text in TEXTS.values() for row in text.splitlines() if "evidence/results/" in row]
)
def test_numbers_stand_in_the_result_file(row: str) -> None:
    (name,) = re.findall(r"\]\((?:\.\./)?(evidence/results/[^)]+)\)", row)
    measured = list(_numbers(json.loads((ROOT / name).read_text(encoding="utf-8"))))
    text = re.sub(r"\[[^]]*\]\([^)]*\)", "", row)
    for number in re.findall(r"(?<![\w.])\d+(?:\.\d+)?(?![\w.])", text.replace(",", "")):
        digits = len(number.partition(".")[2])
        # as it is, in percent, in milliseconds, in megabytes
        found = any(
            number == f"{value * unit:.{digits}f}" for value in measured for unit in (1, 100, 1e3, 1e-6)
        )
        assert found, f"{number} stands nowhere in {name}"


def _numbers(node: object) -> Iterator[float]:
    match node:
        case bool() | str() | None:
            return
        case int() | float():
            yield float(node)
        case dict():
            for value in node.values():
                yield from _numbers(value)
        case list():
            for value in node:
                yield from _numbers(value)
