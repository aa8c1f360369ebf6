"""``dynamic-llava flops``: tables, JSON, and one line for every bad option."""

from __future__ import annotations

import pytest
from tests.command_line import Command

NUMBERS = {
    "image_tokens_kept", "output_tokens_kept", "prefill_flops", "prefill_flops_paper", "decode_flops_paper",
    "decode_flops_cached", "decode_flops_uncached", "prefill_speedup_bound", "kv_bytes_float16",
}  # fmt: skip


@pytest.fixture(autouse=True)
def terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("│\n").split("│")]


def test_help_has_an_example(command: Command) -> None:
    outcome = command("flops", "--help")
    assert outcome.code == 0
    assert "Example: dynamic-llava flops --preset llava-1.5-7b" in outcome.stdout
    assert "nano, llava-small" in outcome.stdout


def test_tables(command: Command) -> None:
    outcome = command("flops", "--preset", "llava-1.5-7b")
    assert (outcome.code, outcome.stderr) == (0, "")
    lines = outcome.stdout.splitlines()
    assert max(map(len, lines)) <= 80
    assert [cells(line) for line in lines if line.startswith("│")] == [
        ["dense", "576", "10.1", "8.45", "1.00"],
        ["FastV", "144", "3.20 (32%)", "3.21 (38%)", "2.64"],
        ["Dynamic-LLaVA", "115", "2.49 (25%)", "2.68 (32%)", "3.15"],
        ["dense", "159", "2.74", "2.12", "1.52", "417"],
        ["FastV", "159", "2.74", "2.09 (98%)", "0.68 (45%)", "212 (51%)"],
        ["Dynamic-LLaVA", "79.5", "1.46 (53%)", "2.08 (98%)", "0.52 (34%)", "151 (36%)"],
    ]
    text = " ".join(outcome.stdout.split())
    assert "Prefill of llava-1.5-7b: 576 image + 60 text tokens" in text
    assert "leave out vision tower, projector, norms and lm head" in text


def test_units_fit_the_model(command: Command) -> None:
    shown = command("flops", "--preset", "nano").stdout
    assert "GFLOPs" in shown
    assert "TFLOPs" not in shown


def test_json(command: Command) -> None:
    outcome = command("flops", "--preset", "llava-1.5-13b", "--text-tokens", 0, "--layer", 4, "--json")
    assert (outcome.code, outcome.stderr, outcome.stdout.count("\n")) == (0, "", 1)
    content = outcome.json()
    assert content.keys() == {"settings", "dense", "fastv", "dynamic_llava"}
    assert content["settings"] == {
        "preset": "llava-1.5-13b", "image_tokens": 576, "text_tokens": 0, "output_tokens": 159, "layer": 4,
        "image_keep_rate": 0.2, "text_keep_rate": 0.5, "fastv_layer": 3, "fastv_keep_rate": 0.25,
    }  # fmt: skip
    for method in ("dense", "fastv", "dynamic_llava"):
        numbers = content[method]
        assert numbers.keys() == NUMBERS
        assert all(isinstance(value, float) for name, value in numbers.items() if "flops" in name)
        assert isinstance(numbers["kv_bytes_float16"], int)
    assert content["dense"]["kv_bytes_float16"] == 40 * 2 * 5120 * 2 * (576 + 159)
    held = 4 * (576 + 159) + 36 * (115 + 79.5)
    assert content["dynamic_llava"]["kv_bytes_float16"] == 2 * 5120 * 2 * held
    assert content["fastv"]["decode_flops_paper"] == content["dense"]["decode_flops_paper"]


def test_options_reach_the_count(command: Command) -> None:
    arguments = ("--image-keep-rate", 0.5, "--fastv-keep-rate", 0.125, "--fastv-layer", 1)
    content = command("flops", *arguments, "--output-tokens", 10, "--text-keep-rate", 0.25, "--json").json()
    assert content["dynamic_llava"]["image_tokens_kept"] == 288
    assert content["dynamic_llava"]["output_tokens_kept"] == 2.5
    assert content["fastv"]["image_tokens_kept"] == 72
    assert content["settings"]["fastv_layer"] == 1


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--preset", "llava", "'llava' is no preset: choose one of nano"),
        ("--layer", "32", "layer is 32: llava-1.5-7b has 32 layers, choose 1 to 31"),
        ("--fastv-layer", "0", "fastv_layer is 0"),
        ("--image-keep-rate", "0", "image_keep_rate is 0.0: a keep rate must be greater than 0"),
        ("--text-keep-rate", "nan", "text_keep_rate is nan"),
        ("--fastv-keep-rate", "2", "fastv_keep_rate is 2.0"),
        ("--text-tokens", "-1", "text_tokens is -1: it must be at least 0"),
        ("--output-tokens", "0", "output_tokens is 0: it must be at least 1"),
        ("--output-tokens", "many", "--output-tokens"),
    ],
)
def test_bad_option(option: str, value: str, message: str, command: Command) -> None:
    outcome = command("flops", option, value)
    assert (outcome.code, outcome.stdout) == (2, "")
    assert outcome.stderr.startswith("error: ")
    assert outcome.stderr.count("\n") == 1
    assert message in outcome.stderr
