"""vLLM in this process, driven step by step to count its blocks and rows: for programs here and for tests.

Importing this sets up vLLM for one process and one thread, and must come before vLLM is imported.
"""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ |= {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "OMP_NUM_THREADS": "1",
    "VLLM_LOGGING_LEVEL": os.environ.get("VLLM_LOGGING_LEVEL", "ERROR"),
    "VLLM_NO_USAGE_STATS": "1",
}

from PIL import Image
from safetensors.torch import load_file, save_file
from vllm import LLM, SamplingParams
from vllm.distributed import cleanup_dist_env_and_memory
from vllm.v1.core.sched.async_scheduler import AsyncScheduler

from dynamic_llava.adapter import CONFIG_FILE
from dynamic_llava.chat.asking import encode, greedy
from dynamic_llava.chat.prompt import chat_prompt
from dynamic_llava.data import scenes
from dynamic_llava.vllm.rates import changed
from dynamic_llava.vllm.scheduler import AsyncSparseScheduler

BLOCK = 32
"""Tokens of a K/V block, the fewest that vLLM's attention takes on a CPU."""

KEPT = (
    "image_tokens", "image_tokens_kept", "output_tokens", "output_tokens_kept", "kv_bytes", "kv_bytes_dense",
)  # fmt: skip
"""What of a report vLLM returns as well."""

TEXTS = (
    "Describe the picture.",
    "What is there?",
    "Describe everything that you see, one thing after the other, with its color, its size and its place.",
)


@dataclass(frozen=True)
class Asked:
    """One request: a prompt, its pictures, the longest answer, and rates of its own."""

    prompt: str
    images: Sequence[Image.Image]
    longest: int
    sparsity: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Alone:
    """What ``generate`` answers to a request alone, the slots of its layers >= l then, and its report."""

    tokens: list[int]
    prompt: int
    slots: int
    kept: dict[str, int]


@dataclass
class Run:
    """What came out of an engine."""

    answers: dict[int, list[int]] = field(default_factory=dict)
    kept: dict[int, dict[str, int]] = field(default_factory=dict)
    steps: int = 0
    peak_blocks: int = 0
    most_rows: int = 0
    mean_rows: float = 0.0
    preempted: int = 0
    blocks_left: int = 0
    entries_left: int = 0


@dataclass
class Counted:
    """What a scheduler saw since it was last set back."""

    rows: list[int] = field(default_factory=list)
    peak_blocks: int = 0
    preempted: int = 0


class Counting:
    """A mixin before a scheduler that counts what its steps hold, before they free anything."""

    counted = Counted()

    def update_from_output(self, scheduler_output: Any, model_runner_output: Any) -> Any:
        """Count a step."""
        self.counted.rows.append(len(self.running))  # type: ignore[attr-defined]
        self.counted.peak_blocks = max(self.counted.peak_blocks, used(self))
        return super().update_from_output(scheduler_output, model_runner_output)  # type: ignore[misc]

    def _preempt_request(self, *args: Any, **kwargs: Any) -> Any:
        self.counted.preempted += 1
        return super()._preempt_request(*args, **kwargs)  # type: ignore[misc]


class CountingSparse(Counting, AsyncSparseScheduler):
    """The plugin's scheduler."""


class CountingStock(Counting, AsyncScheduler):
    """vLLM's own."""


def mixed(processor: Any, count: int, seed: int = 0, longest: int = 40, rates: bool = True) -> list[Asked]:
    """Draw requests of 0 to 3 pictures with long and short texts; three of five have rates of their own."""
    rng = random.Random(seed)
    drawn: list[Asked] = []
    for number in range(count):
        pictures = [scenes.scene(rng.randrange(10_000), "heldout").draw() for _ in range(rng.randint(0, 3))]
        own: list[dict[str, Any]] = [
            {},
            {},
            {"image_keep_rate": rng.uniform(0.1, 0.9)},
            {"text_keep_rate": 0.25},
            {"dense": True},
        ]
        drawn.append(
            Asked(
                chat_prompt(processor, rng.choice(TEXTS), len(pictures)),
                pictures,
                rng.randint(1, longest),
                own[number % len(own)] if rates else {},
            )
        )
    return drawn


def alone(model: Any, processor: Any, asked: Asked) -> Alone:
    """Answer by transformers, one row, with the rates of the request."""
    config = model.sparsifier.config
    model.sparsifier.config = changed(config, asked.sparsity)
    try:
        inputs = encode(processor, [asked.prompt], list(asked.images))
        tokens = greedy(model, inputs, asked.longest)[0].tolist()
        report = model.sparsifier.report
        held, summary = int(report.kv_lengths[-1, 0]), report.summary()
        kept = {name: int(summary[name]) for name in KEPT}
        last_stays = bool(report.text_kept[0][-1]) if len(report.text_kept[0]) else True
    finally:
        model.sparsifier.config = config
    return Alone(tokens, inputs["input_ids"].shape[1], held + (not last_stays), kept)


@contextmanager
def engine(checkpoint: Path, **settings: Any) -> Iterator[LLM]:
    """Run vLLM on a checkpoint, in float32, with 64 MiB of K/V; one at a time in a process."""
    chosen = {
        "dtype": "float32",
        "enforce_eager": True,
        "kv_cache_memory_bytes": 64 << 20,
        "block_size": BLOCK,
        "skip_mm_profiling": True,
        "max_model_len": 2048,
        "max_num_seqs": 64,
        "limit_mm_per_prompt": {"image": 3},
        "scheduler_cls": CountingSparse if (checkpoint / CONFIG_FILE).exists() else CountingStock,
    }
    llm = LLM(str(checkpoint), **chosen | settings)
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()
        cleanup_dist_env_and_memory()


def serve(
    llm: LLM, asked: Sequence[Asked], each: int = 0, aborted: Sequence[int] = (), run_to_end: bool = False
) -> Run:
    """Run requests to their ends.

    Parameters
    ----------
    each
        Requests that arrive before each step; 0 lets all arrive at once.
    aborted
        Numbers of requests that are aborted two steps after they arrived.
    run_to_end
        Let every answer have its full length.
    """
    core: Any = llm.llm_engine
    scheduler = core.engine_core.engine_core.scheduler
    waiting, run = list(enumerate(asked)), Run()
    due: dict[int, list[int]] = {}
    scheduler.counted = Counted()
    while waiting or core.has_unfinished_requests():
        arrive, waiting = waiting[: each or None], waiting[each:] if each else []
        for number, request in arrive:
            core.add_request(str(number), inputs_of(request), parameters(request, run_to_end))
            if number in aborted:
                due.setdefault(run.steps + 2, []).append(number)
        names = {output.request_id: output for output in core.step() if output.finished}
        for name, output in names.items():
            run.answers[int(name)] = list(output.outputs[0].token_ids)
            run.kept[int(name)] = (output.kv_transfer_params or {}).get("sparsity", {})
        run.steps += 1
        for number in due.pop(run.steps, ()):
            if number not in run.answers:
                core.abort_request([str(number)])
    counted = scheduler.counted
    run.peak_blocks, run.preempted = counted.peak_blocks, counted.preempted
    run.most_rows, run.mean_rows = max(counted.rows), sum(counted.rows) / len(counted.rows)
    run.blocks_left = used(scheduler)
    run.entries_left = len(scheduler.book) if hasattr(scheduler, "book") else 0
    return run


def used(scheduler: Any) -> int:
    """Return how many blocks requests hold; one is vLLM's own."""
    pool = scheduler.kv_cache_manager.block_pool
    return int(pool.num_gpu_blocks - 1 - pool.get_num_free_blocks())


def inputs_of(asked: Asked) -> dict[str, Any]:
    """Return what vLLM takes."""
    pictures = {"multi_modal_data": {"image": list(asked.images)}} if asked.images else {}
    return {"prompt": asked.prompt} | pictures


def parameters(asked: Asked, run_to_end: bool) -> SamplingParams:
    """Return greedy parameters with the rates of the request."""
    return SamplingParams(
        temperature=0,
        max_tokens=asked.longest,
        ignore_eos=run_to_end,
        extra_args=dict(asked.sparsity) or None,
    )


def block_formula(alone: Alone, layers: int, first_sparse: int, group: int) -> int:
    """Return how many blocks a request alone holds at most, by what it keeps.

    vLLM shares the blocks of ``group`` layers, and never of a dense and a sparse one.
    """
    fed = alone.prompt + len(alone.tokens) - 1  # the last token is not fed back
    dense, sparse = -(-first_sparse // group), -(-(layers - first_sparse) // group)
    return dense * -(-fed // BLOCK) + sparse * -(-alone.slots // BLOCK)


def stock_copy(checkpoint: Path, folder: Path) -> Path:
    """Write a checkpoint without its sparsifier, its tower named as vLLM's own class expects it."""
    folder.mkdir(parents=True)
    for file in checkpoint.iterdir():
        if file.suffix in (".json", ".jinja") and file.name != CONFIG_FILE:
            shutil.copy(file, folder)
    tensors = load_file(checkpoint / "model.safetensors")
    tower, inner = "vision_tower.", "vision_tower.vision_model."
    named = {
        name.replace(tower, inner, 1) if name.startswith(tower) and inner not in name else name: tensor
        for name, tensor in tensors.items()
    }
    save_file(named, folder / "model.safetensors", metadata={"format": "pt"})
    return folder
