"""``--device`` and ``--dtype`` of every command that asks a model; one line where there is no such device."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tests.command_line import Command, refused

from dynamic_llava import environment
from dynamic_llava.cli import model as asked

GOLDEN = Path(__file__).parents[3] / "shared" / "golden"


@pytest.fixture(params=["demo", "generate", "evaluate", "verify"])
def ask(
    request: pytest.FixtureRequest, checkpoint: Path, picture: Path, tmp_path: Path
) -> tuple[object, ...]:
    """A command without ``--device``."""
    (tmp_path / "golden").mkdir()
    return {
        "demo": ("demo", "--model", checkpoint, "--out", tmp_path / "out"),
        "generate": ("generate", "--model", checkpoint, "--image", picture, "--prompt", "?"),
        "evaluate": ("evaluate", "--model", checkpoint, "--task", "scenes", "--limit", 1),
        "verify": ("verify", tmp_path / "golden"),
    }[request.param]


@pytest.mark.parametrize("name", ["cuda:99", "mps:99", "attic", "meta"])
def test_device_that_is_not_there(ask: tuple[object, ...], name: str, command: Command) -> None:
    line = refused(command, *ask, "--device", name)
    assert f"device is '{name}'" in line
    assert "choose cpu" in line


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_gpu_that_is_not_there(ask: tuple[object, ...], command: Command) -> None:
    assert "device is 'cuda', but torch sees no such device here" in refused(
        command, *ask, "--device", "cuda"
    )


def test_accelerator_is_the_default(
    ask: tuple[object, ...], command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(environment, "default_device", lambda: torch.device("cuda:99"))
    assert "device is 'cuda:99'" in refused(command, *ask)


def test_bad_dtype(ask: tuple[object, ...], command: Command) -> None:
    assert "'int8' is not one of 'float32', 'bfloat16', 'float16'" in refused(
        command, *ask, "--dtype", "int8"
    )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_dtype_is_what_it_computes_in(
    dtype: str, command: Command, checkpoint: Path, picture: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: list[torch.dtype] = []
    load = asked.load

    def noting(*args: object) -> object:
        loaded = load(*args)  # type: ignore[arg-type]
        found.append(loaded[0].dtype)
        return loaded

    monkeypatch.setattr(asked, "load", noting)
    ask = ("generate", "--image", picture, "--prompt", "what?", "--model", checkpoint, "--max-new-tokens", 2)
    assert command(*ask, "--device", "cpu", "--dtype", dtype).code == 0
    assert found == [getattr(torch, dtype)]


def test_verify_on_a_named_device(command: Command) -> None:
    if not GOLDEN.is_dir():
        pytest.skip("the golden vectors do not lie beside the repository")
    outcome = command("verify", GOLDEN / "unit", "--device", "cpu", "--dtype", "float32", "--json")
    assert outcome.json()["passed"]
