"""Measure what the plugin gives vLLM on a CPU: rows held at an equal K/V budget, requests/s, and CPU seconds.

Stock vLLM and the plugin serve the same requests to the same weights, all arriving at once, every answer of
full length. ``nano`` as it is trained; and a random LLaVA of 16 layers with 576 image tokens, of which 20 %
stay, with output tokens left alone: what its random predictor decides on them would mean nothing.

Model Runner V1, eager, float32, one thread, sides in turn. A quarter of an hour on two cores, in the
environment of make check-vllm, with .ci/vllm in PYTHONPATH:

    python -m evidence.serving_capacity --output evidence/results/serving-capacity.json
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, LlavaForConditionalGeneration

from dynamic_llava import Sparsifier, SparsityConfig, checkpoints
from evidence import serving_cases

MODULE = "serving_capacity"
SIDES = ("stock", "sparse")
WORKLOADS: dict[str, dict[str, Any]] = {
    "nano, 16 MB": {
        "requests": 60, "longest": 40, "settings": {"kv_cache_memory_bytes": 16 << 20, "max_model_len": 704},
    },
    "576 image tokens, 200 MB": {
        "requests": 8, "longest": 32, "settings": {"kv_cache_memory_bytes": 200 << 20, "max_model_len": 1024},
    },
    "576 image tokens, ample": {
        "requests": 8, "longest": 32, "settings": {"kv_cache_memory_bytes": 1 << 30, "max_model_len": 1024},
    },
}  # fmt: skip
WIDTH, LAYERS, IMAGE_SIDE, PATCH_SIDE = 768, 16, 336, 14


def random_checkpoint(folder: Path) -> Path:
    """Write a random LLaVA with 576 image tokens and a sparsifier, with nano's tokenizer."""
    nano = checkpoints.resolve("nano")
    config = AutoConfig.from_pretrained(nano)
    decoder = {"hidden_size": WIDTH, "intermediate_size": 2048, "num_hidden_layers": LAYERS}
    config.text_config.update(
        decoder | {"num_attention_heads": 12, "num_key_value_heads": 12, "head_dim": 64}
    )
    config.vision_config.update({"image_size": IMAGE_SIDE, "patch_size": PATCH_SIDE})
    config.image_seq_length = (IMAGE_SIDE // PATCH_SIDE) ** 2
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration(config).eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
    Sparsifier(SparsityConfig(sparsify_text=False), WIDTH).eval().attach(model)
    processor: Any = checkpoints.Source("nano").processor
    side = {"height": IMAGE_SIDE, "width": IMAGE_SIDE}
    processor.image_processor.size = processor.image_processor.crop_size = side
    processor.patch_size = PATCH_SIDE
    checkpoints.save(model, processor, folder)
    return folder


def checkpoint(workload: str, side: str, folder: Path) -> Path:
    """Return the checkpoint of a side, written where it is not there yet."""
    from evidence import serving_engine

    sparse = checkpoints.resolve("nano") if workload.startswith("nano") else folder / "random"
    if not sparse.exists():
        random_checkpoint(sparse)
    if side == "sparse":
        return sparse
    stock = folder / f"stock-{sparse.name}"
    return stock if stock.exists() else serving_engine.stock_copy(sparse, stock)


def measure(case: str, folder: Path) -> dict[str, Any]:
    """Serve a workload on one side, after a request that warms up."""
    from evidence import serving_engine

    workload, side = case.split("; ")[:2]
    source = checkpoint(workload, side, folder)
    settings = WORKLOADS[workload]
    processor: Any = checkpoints.Source(source).processor
    asked = one_picture(processor, settings["requests"], settings["longest"])
    with serving_engine.engine(source, **settings["settings"]) as llm:
        serving_engine.serve(llm, asked[:1], run_to_end=True)
        started, cpu = time.perf_counter(), time.process_time()
        run = serving_engine.serve(llm, asked, run_to_end=True)
        seconds, cpu = time.perf_counter() - started, time.process_time() - cpu
        size = llm.llm_engine.vllm_config.cache_config.num_gpu_blocks
    return {
        "rows_most": run.most_rows, "rows_mean": run.mean_rows,
        "steps": run.steps, "preempted": run.preempted,
        "peak_share_of_blocks": run.peak_blocks / (size - 1), "cpu_seconds": cpu, "seconds": seconds,
        "requests_per_second": len(asked) / seconds, "answers": len(run.answers),
    }  # fmt: skip


def one_picture(processor: Any, count: int, longest: int) -> list[Any]:
    """Draw requests of one picture each, so that rows can be counted."""
    from evidence import serving_engine

    drawn = serving_engine.mixed(processor, 8 * count, longest=longest, rates=False)
    found = [asked for asked in drawn if len(asked.images) == 1][:count]
    return [serving_engine.Asked(asked.prompt, asked.images, longest) for asked in found]


def summary(repeats: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Return the median of each number of both sides, and how they compare."""
    sides = {
        side: {name: statistics.median(run[name] for run in runs) for name in runs[0]}
        for side, runs in repeats.items()
    }
    stock, sparse = (sides[side] for side in SIDES)
    ratios = {name: sparse[name] / stock[name] for name in ("rows_most", "rows_mean", "requests_per_second")}
    return sides | {
        "sparse_over_stock": ratios,
        "stock_over_sparse": {"cpu_seconds": stock["cpu_seconds"] / sparse["cpu_seconds"]},
    }


def main() -> int:
    """Measure all workloads on both sides, in turn."""
    parser = serving_cases.parser(__doc__)
    parser.add_argument("--repeats", type=int, default=3, help="runs of each side")
    options = parser.parse_args()
    if options.case:
        print(json.dumps(measure(options.case, options.folder)))
        return 0
    numbers = {}
    with tempfile.TemporaryDirectory() as folder:
        for workload in WORKLOADS:
            runs: dict[str, list[dict[str, Any]]] = {side: [] for side in SIDES}
            for repeat in range(options.repeats):
                for side in SIDES:
                    case = f"{workload}; {side}; {repeat}"
                    runs[side].append(serving_cases.run_one(MODULE, case, Path(folder), {}))
            numbers[workload] = summary(runs)
    serving_cases.write(MODULE, options.output, numbers)
    return 0


if __name__ == "__main__":
    sys.exit(main())
