"""vLLM with the plugin, on nano: answers, memory, requests that are refused, settings that are refused."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import dynamic_llava
from dynamic_llava.checkpoints import resolve

pytest.importorskip("vllm", reason="vLLM is not installed; make check-vllm installs it")

from evidence.serving_engine import Alone, Asked
from vllm.exceptions import VLLMValidationError

from dynamic_llava.vllm.plugin import refused_version
from evidence import serving_engine

COUNT = 16
LAYERS, FIRST_SPARSE, GROUP = 8, 2, 2
TIGHT = {"kv_cache_memory_bytes": 12 << 20, "max_model_len": 704, "max_num_batched_tokens": 256}


@pytest.fixture(scope="module")
def asked() -> list[Asked]:
    processor: Any = dynamic_llava.checkpoints.Source("nano").processor
    return serving_engine.mixed(processor, COUNT, longest=24)


@pytest.fixture(scope="module")
def alone(asked: list[Asked]) -> list[Alone]:
    model, processor = dynamic_llava.load("nano", dtype=torch.float32)
    return [serving_engine.alone(model, processor, request) for request in asked]


@pytest.fixture(scope="module", params=[{}, {"async_scheduling": False, **TIGHT}], ids=["ample", "tight"])
def llm(request: pytest.FixtureRequest) -> Iterator[Any]:
    with serving_engine.engine(resolve("nano"), **request.param) as made:
        yield made


def test_every_answer_is_that_of_its_request_alone(llm: Any, asked: list[Asked], alone: list[Alone]) -> None:
    aborted = next(number for number, answer in enumerate(alone) if len(answer.tokens) > 8)
    run = serving_engine.serve(llm, asked, each=3, aborted=[aborted])
    expected = {number: answer.tokens for number, answer in enumerate(alone) if number != aborted}
    assert run.answers == expected
    assert run.kept == {number: alone[number].kept for number in expected}
    assert (run.blocks_left, run.entries_left) == (0, 0)


def test_a_request_alone_holds_the_blocks_of_the_formula(
    llm: Any, asked: list[Asked], alone: list[Alone]
) -> None:
    for request, answer in list(zip(asked, alone, strict=True))[:6]:
        run = serving_engine.serve(llm, [request])
        blocks = serving_engine.block_formula(answer, LAYERS, FIRST_SPARSE, GROUP)
        assert run.peak_blocks == blocks


@pytest.mark.parametrize("sparsity", [{"image_keep_rate": 2}, {"dense": "yes"}])
def test_a_wrong_rate_ends_its_own_request_alone(llm: Any, asked: list[Asked], sparsity: Any) -> None:
    wrong = Asked(asked[0].prompt, asked[0].images, 4, sparsity)
    with pytest.raises((ValueError, VLLMValidationError), match=next(iter(sparsity))):
        serving_engine.serve(llm, [wrong])
    assert len(serving_engine.serve(llm, asked[:1]).answers) == 1


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"additional_config": {"sparsity": {"rate": 1}}}, "sparsity: rate is unknown"),
        ({"scheduler_cls": "vllm.v1.core.sched.scheduler.Scheduler"}, "--scheduler-cls"),
        ({"pipeline_parallel_size": 2}, "--pipeline-parallel-size"),
        ({"enable_lora": True}, "--enable-lora"),
    ],
)
def test_settings_that_do_not_fit_are_refused(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said), serving_engine.engine(resolve("nano"), **settings):
        pass


def test_versions_that_were_not_tested_are_refused() -> None:
    assert refused_version("0.32.0+cpu") == ""
    for version in ("0.31.2", "0.33.0", "1.0"):
        assert f"vLLM {version} was not tested" in refused_version(version)


def test_a_stock_checkpoint_stays_stock(tmp_path: Path) -> None:
    from vllm.model_executor.models.llava import LlavaForConditionalGeneration

    folder = serving_engine.stock_copy(resolve("nano"), tmp_path / "stock")
    with serving_engine.engine(folder) as made:
        (kind,) = made.llm_engine.apply_model(type)
    assert kind is LlavaForConditionalGeneration


@pytest.mark.slow
def test_two_workers_answer_as_one(
    asked: list[Asked], alone: list[Alone], monkeypatch: pytest.MonkeyPatch
) -> None:
    # Each has half of the heads, and the same predictors. vLLM compiles a function of theirs even where all
    # is eager; beside Triton's interpreter, which V2 needs on a CPU, that does not work.
    monkeypatch.setenv("TORCHDYNAMO_DISABLE", os.environ.get("VLLM_USE_V2_MODEL_RUNNER", "0"))
    with serving_engine.engine(resolve("nano"), tensor_parallel_size=2, **TIGHT) as made:
        run = serving_engine.serve(made, asked, each=3)
    assert run.answers == {number: answer.tokens for number, answer in enumerate(alone)}
    assert (run.blocks_left, run.entries_left) == (0, 0)
    kept = alone[0].kept
    assert run.kept[0] == kept | {name: kept[name] // 2 for name in ("kv_bytes", "kv_bytes_dense")}
