"""``dynamic-llava bench``: every phase, its files, and one line for every bad option. No time is asserted."""

from __future__ import annotations

import errno
import io
import json
import math
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
from tests.bench.conftest import settings
from tests.test_files import BAD_FILES
from tests.tiny import model as tiny_model
from tests.tiny import sparsifier as tiny_sparsifier

from dynamic_llava import methods
from dynamic_llava.bench import PHASES, machine, run
from dynamic_llava.cli import bench
from dynamic_llava.cli.usage import Commands

SMALL = ("--model", "tiny", "--output-tokens", 8, "--text-tokens", 6, "--repeats", 2, "--device", "cpu")
Command = Callable[..., tuple[int, str, str]]


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """Run ``dynamic-llava bench`` in this process; return exit code, stdout and stderr."""
    app = typer.Typer(cls=Commands, rich_markup_mode=None, add_completion=False)

    @app.callback()
    def common(traceback: bool = False) -> None: ...

    app.command("bench")(bench.command)

    def call(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["dynamic-llava", "bench", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as exited:
            app()
        return int(exited.value.code or 0), *capsys.readouterr()

    return call


def numbers(content: Any) -> Iterator[float]:
    if isinstance(content, dict | list):
        for value in content.values() if isinstance(content, dict) else content:
            yield from numbers(value)
    elif isinstance(content, int | float):
        yield content


def test_every_phase(command: Command) -> None:
    code, stdout, stderr = command(
        *SMALL, *(part for phase in PHASES for part in ("--phase", phase)), "--json"
    )
    assert code == 0, stderr
    assert stdout.count("\n") == 1
    result = json.loads(stdout)
    assert list(result["phases"]) == list(PHASES)
    assert all(math.isfinite(number) for number in numbers(result))
    assert result["command"].startswith("dynamic-llava bench --model tiny")
    (point,) = result["phases"]["decode"]
    assert (point["batch"], point["prompt_tokens"], point["output_tokens"]) == (1, 22, 8)
    images, outputs = methods.names("image"), methods.names("output")
    baselines = {"dense", "static", "preallocated", "downsample"}
    assert set(point["contenders"]) == {*baselines, *images, *outputs}
    learned = point["contenders"]["learned"]
    assert set(learned["speedup"]) == {"dense", "static", "preallocated"}
    assert sum(chunk["steps"] for chunk in learned["chunks"]) == 8
    assert learned["cache_bytes_held"] < point["contenders"]["dense"]["cache_bytes_held"]
    assert learned["bound"] > 1 == point["contenders"]["static"]["bound"]
    without_cache = set(result["phases"]["no-cache"][0]["contenders"])
    assert without_cache == {"dense", "downsample", *images}
    overhead = result["phases"]["overhead"][0]["decode"]["attached, keeps all"]
    assert overhead["kept_output_share"] == 1
    assert result["phases"]["generate"][0]["contenders"]["dense"]["outside"]["min"] > 0
    assert "Overhead of attaching" in stderr


def test_sweep_with_files_and_plots(command: Command, tmp_path: Path) -> None:
    out, plots = tmp_path / "result.json", tmp_path / "plots"
    code, stdout, stderr = command(
        *SMALL, "--batch", 1, "--batch", 2, "--output-tokens", 4, "--phase", "decode",
        "--policies", "dense,learned", "--policies", "uniform", "--dtype", "bfloat16",
        "--output", out, "--plot", plots,
    )  # fmt: skip
    assert code == 0, stderr
    result = json.loads(out.read_text())
    points = [(point["batch"], point["output_tokens"]) for point in result["phases"]["decode"]]
    assert points == [(1, 8), (1, 4), (2, 8), (2, 4)]
    assert list(result["phases"]["decode"][0]["contenders"]) == ["dense", "learned", "uniform"]
    assert result["settings"]["dtype"] == "bfloat16"
    assert {path.name for path in plots.iterdir()} == {
        "time-per-token.png", "cache-bytes.png", "throughput.png",
    }  # fmt: skip
    assert "Decoding with a cache" in stdout
    assert stderr.count("written: ") == 4


def test_the_result_is_kept_where_it_cannot_be_shown(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Full(io.StringIO):
        def write(self, text: str) -> int:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(sys, "stdout", Full())
    out = tmp_path / "result.json"
    code, _, stderr = command(*SMALL, "--phase", "prefill", "--policies", "dense", "--output", out)
    assert (code, "No space left on device" in stderr) == (2, True)
    assert json.loads(out.read_text())["phases"].keys() == {"prefill"}


@pytest.mark.parametrize("sparse", [True, False])
def test_checkpoint(command: Command, tmp_path: Path, sparse: bool) -> None:
    model = tiny_model()
    model.save_pretrained(tmp_path / "model")
    if sparse:
        trained = tiny_sparsifier()
        trained.attach(model)
        trained.save_pretrained(tmp_path / "model")
    code, stdout, stderr = command(
        "--model", tmp_path / "model", *SMALL[2:], "--policies", "dense,learned", "--json"
    )
    assert code == 0, stderr
    result = json.loads(stdout)
    assert result["model"]["image_tokens"] == 16
    assert result["phases"]["decode"][0]["contenders"]["learned"]["kept_output_share"] == pytest.approx(
        0.5, abs=0.15
    )


def test_help_has_an_example(command: Command) -> None:
    code, stdout, _ = command("--help")
    assert code == 0
    assert "Example: dynamic-llava bench --model llava-small" in stdout


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (("--phase", "training"), "--phase has 'training': choose from prefill, decode"),
        (("--policies", "dense,h3o"), "--policies has 'h3o': choose from dense, static"),
        (("--dtype", "int8"), "--dtype is 'int8'"),
        (("--device", "tpu9"), "--device is 'tpu9'"),
        (("--device", "cuda:99"), "--device is 'cuda:99'"),
        (("--batch", 0), "--batch is 0"),
        (("--output-tokens", -1), "--output-tokens is -1"),
        (("--text-tokens", 0), "--text-tokens is 0"),
        (("--repeats", 0), "--repeats is 0"),
        (("--layers", 0), "--layers is 0"),
        (("--output", "/dev/null/x.json"), "--output: /dev/null is no folder"),
        (("--plot", "/dev/null"), "--plot: /dev/null is no folder"),
        (("--phase", "prefill,training"), "--phase has 'training'"),
        (("--policies", ","), "--policies is empty"),
        (("--layers", 1), "--layers is 1"),
        (("--layers", 2), "--layer is 2: the model has 2 layers, choose 1 to 1"),
        (("--layer", 4), "--layer is 4: the model has 4 layers, choose 1 to 3"),
        (("--layer", 0), "layer is 0"),
        (("--image-keep-rate", 0), "image_keep_rate is 0"),
        (("--text-keep-rate", 1.5), "text_keep_rate is 1.5"),
        (("--phase", "no-cache", "--policies", "static"), "--phase no-cache uses no preallocated cache"),
        (("--output", "."), "--output is .: it must name a file"),
        (("--model", "no-such-model"), "no-such-model"),
        (("--model", "no-such-model", "--layers", 2), "--layers cuts presets only"),
        (("--batch", "many"), "Invalid value for '--batch'"),
    ],
)
def test_bad_options_end_with_one_line(command: Command, options: tuple[object, ...], named: str) -> None:
    code, stdout, stderr = command(*SMALL, *options)
    assert (code, stdout) == (2, "")
    assert stderr.startswith("error: ")
    assert stderr.count("\n") == 1
    assert named in stderr


@pytest.mark.parametrize(("make", "message"), BAD_FILES)
def test_bad_output_is_refused_before_a_model_is_loaded(
    make: Callable[[Path], Path], message: str, command: Command, tmp_path: Path
) -> None:
    code, stdout, stderr = command("--model", "no-such-model", "--output", make(tmp_path))
    assert (code, stdout, stderr.count("\n")) == (2, "", 1)
    assert message in stderr


def test_plots_need_matplotlib(command: Command, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(bench, "find_spec", lambda name: None)
    code, _, stderr = command(*SMALL, "--plot", tmp_path)
    assert (code, stderr.count("\n")) == (2, 1)
    assert "pip install 'dynamic-llava[bench]'" in stderr


def test_too_little_memory_is_refused(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "available_bytes", lambda device: 2_000)
    code, _, stderr = command(*SMALL)
    assert code == 2
    assert "not enough memory on cpu" in stderr
    assert "--layers" in stderr
    assert stderr.count("\n") == 1


def test_interrupt_ends_cleanly(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object) -> float:
        raise KeyboardInterrupt

    monkeypatch.setattr(machine, "matmul_rate", interrupt)
    assert command(*SMALL) == (130, "", "interrupted\n")


def test_progress_counts_every_turn() -> None:
    left: dict[str, int] = {}

    def progress(name: str, turns: int) -> Callable[[], None]:
        left[name] = turns
        return lambda: left.update({name: left[name] - 1})

    run(settings(phases=PHASES), progress)
    assert len(left) == 6
    assert set(left.values()) == {0}


@pytest.mark.slow
def test_compiled_decoding(command: Command) -> None:
    code, stdout, stderr = command(
        *SMALL, "--phase", "decode", "--compile", "--policies", "dense,static,learned", "--json"
    )
    assert code == 0, stderr
    result = json.loads(stdout)
    assert result["settings"]["compiled"] is True
    assert all(math.isfinite(number) for number in numbers(result))
