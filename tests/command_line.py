"""A tiny untrained checkpoint with nano's own tokenizer and processor, and a way to call the command line."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlavaForConditionalGeneration, LlavaProcessor

from dynamic_llava import Sparsifier, SparsityConfig, checkpoints, cli
from dynamic_llava.training.nano import build_model, build_processor

LAYERS, HIDDEN = 3, 64


@dataclass(frozen=True)
class Outcome:
    """What a command left behind."""

    code: int
    stdout: str
    stderr: str

    def json(self) -> dict[str, Any]:
        """Parse the last line of stdout."""
        return json.loads(self.stdout.splitlines()[-1])


Command = Callable[..., Outcome]


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """Run ``dynamic-llava`` in this process, with the arguments given."""

    def run(*arguments: object) -> Outcome:
        monkeypatch.setattr(sys, "argv", ["dynamic-llava", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as exited:
            cli.main()
        return Outcome(int(exited.value.code or 0), *capsys.readouterr())

    return run


def refused(command: Command, *arguments: object) -> str:
    """Run a command that must be refused; return its one line."""
    outcome = command(*arguments)
    assert outcome.code == 2
    assert outcome.stdout == ""
    assert outcome.stderr.startswith("error: ")
    assert outcome.stderr.count("\n") == 1
    assert "Traceback" not in outcome.stderr
    return outcome.stderr


@pytest.fixture(scope="session")
def processor() -> LlavaProcessor:
    return build_processor(scene_count=50)


def untrained(processor: LlavaProcessor) -> LlavaForConditionalGeneration:
    """Nano with a smaller decoder, which says printable words only."""
    config = build_model(processor, seed=0).config
    config.text_config.update(
        {
            "hidden_size": HIDDEN,
            "intermediate_size": 64,
            "num_hidden_layers": LAYERS,
            "head_dim": 16,
        }
    )
    config.vision_config.update({"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1})
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration(config).eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
    tokenizer = processor.tokenizer
    texts = {token: tokenizer.decode([token]) for token in range(len(tokenizer))}
    words = {token for token, text in texts.items() if text.isascii() and text.strip(" .,").isalpha()}
    words -= set(tokenizer.all_special_ids)
    model.generation_config.suppress_tokens = sorted(texts.keys() - words)
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    return model


def sparsifier() -> Sparsifier:
    """A sparsifier whose decisions on output tokens are mixed."""
    torch.manual_seed(10)
    made = Sparsifier(
        SparsityConfig(layer=1, d_model=16, nhead=2, dim_feedforward=16), hidden_size=HIDDEN
    ).eval()
    for parameter in made.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=2 * parameter.shape[-1] ** -0.5)
    return made


@pytest.fixture(scope="session")
def checkpoint(processor: LlavaProcessor, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sparse checkpoint; tests must not write to it."""
    folder = tmp_path_factory.mktemp("checkpoint") / "tiny"
    model = untrained(processor)
    sparsifier().attach(model)
    checkpoints.save(model, processor, folder)
    return folder


@pytest.fixture(scope="session")
def stock_checkpoint(processor: LlavaProcessor, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same model without a sparsifier."""
    folder = tmp_path_factory.mktemp("checkpoint") / "stock"
    checkpoints.save(untrained(processor), processor, folder)
    return folder


@pytest.fixture
def model(checkpoint: Path) -> LlavaForConditionalGeneration:
    return checkpoints.load_model(checkpoint)
