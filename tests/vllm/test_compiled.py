"""Both halves of the decoder under torch.compile, compiled anew and found on disk."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlavaForConditionalGeneration, LlavaProcessor

from dynamic_llava import Sparsifier, SparsityConfig, checkpoints
from dynamic_llava.training.nano import build_model

pytest.importorskip("vllm", reason="vLLM is not installed; make check-vllm installs it")

from tests.vllm import small

from evidence import serving_engine

WIDTH = 64
pytestmark = pytest.mark.skipif(
    os.environ.get("VLLM_USE_V2_MODEL_RUNNER") == "1",
    reason="on a CPU, V2 needs Triton's interpreter, beside which torch.compile does not work",
)


def written(processor: LlavaProcessor, folder: Path, layer: int) -> Path:
    """Write a small random checkpoint whose heads are of a size that vLLM takes on a CPU."""
    config = build_model(processor, seed=0).config
    config.text_config.update(
        {"hidden_size": WIDTH, "intermediate_size": 64, "num_hidden_layers": 4, "head_dim": 32}
    )
    config.text_config.update({"num_attention_heads": 2, "num_key_value_heads": 2})
    config.vision_config.update({"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1})
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration(config).eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
    model.generation_config.eos_token_id = processor.tokenizer.eos_token_id
    settings = SparsityConfig(layer=layer, d_model=16, nhead=2, dim_feedforward=16)
    Sparsifier(settings, WIDTH).eval().attach(model)
    checkpoints.save(model, processor, folder)
    return folder


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_compiled_halves_answer_the_same_also_from_disk(
    processor: LlavaProcessor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_CACHE_ROOT", str(tmp_path / "cache"))
    asked = serving_engine.mixed(processor, 6, longest=12, rates=False)
    for layer in (1, 1, 2):  # anew, from disk, and anew: what is compiled together depends on the layer
        folder = tmp_path / f"layer-{layer}"
        if not folder.exists():
            written(processor, folder, layer)
        model, found = checkpoints.load_with_processor(folder, dtype=torch.float32, device="cpu")
        model.generation_config.suppress_tokens = None
        alone: list[Any] = [serving_engine.alone(model, found, request) for request in asked]
        with serving_engine.engine(folder, enforce_eager=False) as llm:
            run = serving_engine.serve(llm, asked)
        assert run.answers == {number: answer.tokens for number, answer in enumerate(alone)}


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_compiled_halves_take_positions_of_three_axes_and_added_features(
    processor: LlavaProcessor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_CACHE_ROOT", str(tmp_path / "cache"))
    folder = small.written("qwen3_vl", processor, tmp_path / "model")
    model, found = checkpoints.load_with_processor(folder, dtype=torch.float32, device="cpu")
    asked = small.asked("qwen3_vl", most=3)
    alone = [serving_engine.alone(model, found, request) for request in asked]
    with serving_engine.engine(folder, enforce_eager=False) as llm:
        run = serving_engine.serve(llm, asked)
    assert run.answers == {number: answer.tokens for number, answer in enumerate(alone)}
