"""``dynamic-llava bench``: how long a prefill and an output token take here, dense and sparse."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dynamic_llava.cli.options import ImageKeepRate, Json, Layer, Output, TextKeepRate, TextTokens
from dynamic_llava.cli.output import command_line, print_json, say_written
from dynamic_llava.costs.presets import PRESETS
from dynamic_llava.files import check_file, check_folder, write_json

if TYPE_CHECKING:
    from dynamic_llava.bench import Progress


def command(
    model: Annotated[
        str,
        typer.Option(metavar="NAME", help=f"{', '.join(PRESETS)} (random weights), or a folder or hub name."),
    ] = "llava-small",
    phase: Annotated[
        list[str] | None,
        typer.Option(
            help="prefill, decode, no-cache, overhead, generate; commas between. Default: prefill,decode.",
            show_default=False,
        ),
    ] = None,
    policies: Annotated[
        list[str] | None,
        typer.Option(
            help="dense, static, preallocated, downsample or a method; several with commas. Default: all.",
            show_default=False,
        ),
    ] = None,
    batch: Annotated[
        list[int] | None, typer.Option(help="Rows of a batch; repeat it to measure several. Default: 1.")
    ] = None,
    text_tokens: TextTokens = 60,
    output_tokens: Annotated[
        list[int] | None,
        typer.Option(help="Length of the answer in tokens; repeat it to measure several. Default: 100."),
    ] = None,
    image_keep_rate: ImageKeepRate = 0.2,
    text_keep_rate: TextKeepRate = 0.5,
    layer: Layer = 2,
    layers: Annotated[
        int | None, typer.Option(help="Cut the model to its first N layers.", show_default=False)
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(help="float32, bfloat16 or float16. Default: bfloat16 on a GPU.", show_default=False),
    ] = None,
    device: Annotated[
        str | None,
        typer.Option(help="cpu, cuda or cuda:N. Default: a GPU if there is one.", show_default=False),
    ] = None,
    repeats: Annotated[int, typer.Option(help="How often each contender is measured.")] = 5,
    compiled: Annotated[
        bool, typer.Option("--compile", help="Compile the decoding step of all contenders but dense.")
    ] = False,
    seed: Annotated[int, typer.Option(help="Seed of random weights, tokens and choices.")] = 0,
    plot: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Write plots of the decoding to this folder.", show_default=False),
    ] = None,
    output: Output = None,
    as_json: Json = False,
) -> None:
    """Measure the speed of prefill and decoding on this machine, with and without dropping tokens.

    Example: dynamic-llava bench --model llava-small --phase prefill --phase decode
    """
    if plot is not None and find_spec("matplotlib") is None:
        raise ValueError("--plot needs matplotlib: pip install 'dynamic-llava[bench]'")
    if output is not None:
        check_file("--output", output)
    if plot is not None:
        check_folder("--plot", plot)

    import torch
    from rich.console import Console

    from dynamic_llava import bench
    from dynamic_llava.bench.tables import remarks, tables

    phases = _names(phase or ["prefill", "decode"])
    names = _names(policies or bench.known_contenders())
    settings = bench.Settings(
        model=model,
        phases=phases,
        contenders=names,
        batches=tuple(batch or (1,)),
        output_tokens=tuple(output_tokens or (100,)),
        text_tokens=text_tokens,
        image_keep_rate=image_keep_rate,
        text_keep_rate=text_keep_rate,
        layer=layer,
        repeats=repeats,
        layers=layers,
        dtype=dtype,
        device=device,
        compiled=compiled,
        seed=seed,
    )
    try:
        with _progress() as progress:
            measured = bench.run(settings, progress)
    except torch.OutOfMemoryError as error:
        raise ValueError(
            "the device ran out of memory: cut the model with --layers, take a smaller --dtype or --batch"
        ) from error
    result = {"command": command_line(), **measured}
    if output is not None:  # before it is shown: a terminal may be gone after hours
        write_json(output, result)
        say_written(output)
    Console(stderr=as_json).print(*tables(result), remarks(result), sep="\n\n")
    if plot is not None:
        from dynamic_llava.bench.plots import draw_plots

        say_written(*draw_plots(result, plot))
    if as_json:
        print_json(result)


def _names(parts: Sequence[str]) -> tuple[str, ...]:
    """Return the names in options that may be repeated and may hold several, commas between."""
    names = (name.strip() for part in parts for name in part.split(","))
    return tuple(dict.fromkeys(name for name in names if name))


@contextmanager
def _progress() -> Iterator[Progress]:
    """Show on stderr how far each phase is and what time is left."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    columns = TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn()
    # One look a second: drawing takes time from what is measured.
    with Progress(
        *columns, console=console, transient=True, refresh_per_second=1, disable=not console.is_terminal
    ) as bar:

        def begin(name: str, turns: int) -> Callable[[], None]:
            task = bar.add_task(name, total=turns)
            return lambda: bar.advance(task)

        yield begin
