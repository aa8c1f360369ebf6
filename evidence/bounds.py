"""What a sparse context can gain at most while decoding: bytes that a step must read, by batch and answer.

    python -m evidence.bounds

Weights in bfloat16; one picture and 60 text tokens a row, the paper's keep rates (20 % of the image tokens,
half of the output tokens) from layer 2 on. Means over the answer. ``compiled``: with static caches, whose
attention reads all slots under a mask, on both sides.
"""

from __future__ import annotations

from rich.console import Console
from rich.table import Column, Table

from dynamic_llava.costs.presets import PRESETS, Preset
from dynamic_llava.methods.top_k import keep_count

LAYER, TEXT, IMAGE_RATE, TEXT_RATE, ELEMENT = 2, 60, 0.2, 0.5, 2
POINTS = [(1, 1000), (8, 1000), (8, 2000), (8, 4000), (32, 1000), (64, 1000)]
CARD, FREE = 80e9, 0.93  # bytes of a GPU, and the share of them that weights and caches may take


def weights(model: Preset) -> int:
    """Bytes of the weights that a step reads: layers and head."""
    shape = model.shape
    return ELEMENT * (shape.layers * shape.layer_weights + shape.hidden * model.vocabulary)


def cache(model: Preset, dense: float, sparse: float) -> float:
    """Bytes of a row's keys and values, for tokens held below and from layer l on."""
    shape = model.shape
    return shape.kv_bytes_per_token(ELEMENT) * (LAYER * dense + (shape.layers - LAYER) * sparse)


def bounds(model: Preset, batch: int, output: int) -> dict[str, float]:
    """Return the speed-up bounds of a decoding step and what the cache keeps of its size at the end."""
    prompt, end = model.image_tokens + TEXT, model.image_tokens + TEXT + output
    kept = keep_count(model.image_tokens, IMAGE_RATE) + TEXT
    read = weights(model)

    def step(dense: float, sparse: float) -> float:
        return read + batch * cache(model, dense, sparse)

    mean, kept_mean = prompt + output / 2, kept + TEXT_RATE * output / 2
    return {
        "bound": step(mean, mean) / step(mean, kept_mean),
        "compiled": step(end, end) / step(end, kept + output),
        "cache": cache(model, end, kept + TEXT_RATE * output) / cache(model, end, end),
    }


def largest_batch(model: Preset, output: int) -> tuple[int, int]:
    """Return the rows that fit into a card with answers of ``output`` tokens, dense and sparse."""
    prompt, kept = model.image_tokens + TEXT, keep_count(model.image_tokens, IMAGE_RATE) + TEXT
    end, kept_end = prompt + output, kept + TEXT_RATE * output
    room = FREE * CARD - weights(model) - ELEMENT * model.shape.hidden * model.vocabulary
    return int(room / cache(model, end, end)), int(room / cache(model, end, kept_end))


def main() -> None:
    """Print the table."""
    table = Table(
        Column("model", no_wrap=True),
        "batch",
        "output tokens",
        "speed-up at most",
        "compiled",
        "cache of dense's",
    )
    for name in ("llava-1.5-7b", "llava-1.5-13b"):
        for batch, output in POINTS:
            b = bounds(PRESETS[name], batch, output)
            table.add_row(
                name,
                str(batch),
                str(output),
                f"{b['bound']:.2f}",
                f"{b['compiled']:.2f}",
                f"{b['cache']:.1%}",
            )
        dense, sparse = largest_batch(PRESETS[name], 4000)
        table.add_row(name, f"{dense} dense, {sparse} sparse", "4000", "", "", "the most in 80 GB")
    Console().print(table)


if __name__ == "__main__":
    main()
