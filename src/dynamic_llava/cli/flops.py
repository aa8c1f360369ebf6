"""``dynamic-llava flops``: what prefill and decoding cost, by count."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated

import typer

from dynamic_llava.cli.options import ImageKeepRate, Json, Layer, TextKeepRate, TextTokens
from dynamic_llava.cli.output import print_json
from dynamic_llava.costs.flops import FLOP_UNITS, flop_unit
from dynamic_llava.costs.presets import PRESETS

if TYPE_CHECKING:
    from rich.table import Table

    from dynamic_llava.costs.compare import Costs, Settings

NAMES = {"dense": "dense", "fastv": "FastV", "dynamic_llava": "Dynamic-LLaVA"}


def command(
    preset: Annotated[
        str, typer.Option(help=f"Model whose sizes are taken: {', '.join(PRESETS)}.")
    ] = "llava-1.5-7b",
    image_keep_rate: ImageKeepRate = 0.2,
    layer: Layer = 2,
    text_tokens: TextTokens = 60,
    output_tokens: Annotated[int, typer.Option(help="Number of tokens in the answer.")] = 159,
    text_keep_rate: TextKeepRate = 0.5,
    fastv_layer: Annotated[
        int, typer.Option(help="First layer that works without the tokens dropped by FastV.")
    ] = 3,
    fastv_keep_rate: Annotated[
        float, typer.Option(help="Share of the image tokens that FastV keeps, in (0, 1].")
    ] = 0.25,
    as_json: Json = False,
) -> None:
    """Count what prefill and decoding cost, as the paper counts and in true FLOPs.

    Example: dynamic-llava flops --preset llava-1.5-7b
    """
    from rich.console import Console

    from dynamic_llava.costs import compare

    settings = compare.Settings(
        preset=preset,
        text_tokens=text_tokens,
        output_tokens=output_tokens,
        layer=layer,
        image_keep_rate=image_keep_rate,
        text_keep_rate=text_keep_rate,
        fastv_layer=fastv_layer,
        fastv_keep_rate=fastv_keep_rate,
    )
    compared = compare.compare(settings)
    if as_json:
        print_json(compare.as_json(settings, compared))
    else:
        Console().print(prefill_table(settings, compared), "", decode_table(settings, compared))


def prefill_table(settings: Settings, compared: Mapping[str, Costs]) -> Table:
    """Lay out the prefill, one row a method."""
    dense = compared["dense"]
    unit = flop_unit(dense.prefill_flops)
    result = _table(
        f"Prefill of {settings.preset}: {dense.image_tokens_kept} image + {settings.text_tokens} text tokens",
        "As the paper counts: 32 N C² + 4 N² C a layer, N image tokens. True: the layers as they are, image "
        "and text tokens, image predictor. Both leave out vision tower, projector, norms and lm head, and "
        "count attention without a causal discount.",
        "image tokens kept",
        f"as the paper counts, {unit}",
        f"true, {unit}",
        "speed-up at most",
    )
    for name, costs in compared.items():
        result.add_row(
            NAMES[name],
            str(costs.image_tokens_kept),
            _share(costs.prefill_flops_paper, dense.prefill_flops_paper, FLOP_UNITS[unit]),
            _share(costs.prefill_flops, dense.prefill_flops, FLOP_UNITS[unit]),
            f"{costs.prefill_speedup_bound:.2f}",
        )
    return result


def decode_table(settings: Settings, compared: Mapping[str, Costs]) -> Table:
    """Lay out the decoding of the whole answer, one row a method."""
    dense = compared["dense"]
    unit, uncached_unit = flop_unit(dense.decode_flops_cached), flop_unit(dense.decode_flops_uncached)
    result = _table(
        f"Decoding of {settings.output_tokens} output tokens after that prompt",
        "As the paper counts: one pass over the output tokens, without the prompt. True: every step with its "
        "context, kept output tokens spread evenly, and the predictors. All leave out the prefill, norms and "
        "lm head. K/V: at the end of the answer, prompt included.",
        "output tokens kept",
        f"as the paper counts, {unit}",
        f"true, K/V cache, {unit}",
        f"true, no cache, {uncached_unit}",
        "K/V in float16, MB",
    )
    for name, costs in compared.items():
        result.add_row(
            NAMES[name],
            f"{costs.output_tokens_kept:.1f}".removesuffix(".0"),
            _share(costs.decode_flops_paper, dense.decode_flops_paper, FLOP_UNITS[unit]),
            _share(costs.decode_flops_cached, dense.decode_flops_cached, FLOP_UNITS[unit]),
            _share(costs.decode_flops_uncached, dense.decode_flops_uncached, FLOP_UNITS[uncached_unit]),
            _share(costs.kv_bytes_float16, dense.kv_bytes_float16, 1e6),
        )
    return result


def _table(title: str, caption: str, kept: str, *headings: str) -> Table:
    from rich.table import Table

    result = Table(title=title, caption=caption, title_justify="left", caption_justify="left")
    result.add_column(no_wrap=True)
    result.add_column(kept, justify="right", max_width=6)
    for heading in headings:
        result.add_column(heading, justify="right", min_width=10)  # "2.08 (98%)" in one line
    return result


def _share(value: float, dense: float, unit: float) -> str:
    """Return ``value`` in units with three digits, and its share of ``dense`` where it is less."""
    scaled = value / unit
    text = f"{scaled:,.{2 if scaled < 10 else 1 if scaled < 100 else 0}f}"
    return text if value == dense else f"{text} ({value / dense:.0%})"
