"""Options that several commands take, with one wording."""

from __future__ import annotations

from typing import Annotated

import typer

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object as the last line of stdout.")]
ImageKeepRate = Annotated[float, typer.Option(help="Kept image tokens / all, in (0, 1].")]
TextKeepRate = Annotated[float, typer.Option(help="Kept output tokens / all, in (0, 1].")]
Layer = Annotated[int, typer.Option(help="First layer that drops tokens.")]
TextTokens = Annotated[int, typer.Option(help="Tokens of the prompt beside the image.")]
OtherImageKeepRate = Annotated[
    float | None, typer.Option("--image-keep-rate", help="Kept image tokens / all; default: as trained.")
]
OtherTextKeepRate = Annotated[
    float | None, typer.Option("--text-keep-rate", help="Kept output tokens / all; default: as trained.")
]
ImagePolicy = Annotated[
    str | None, typer.Option(help="What drops image tokens: learned, random, uniform or fastv.")
]
TextPolicy = Annotated[
    str | None, typer.Option(help="What drops output tokens: learned, random, uniform, h2o or streaming.")
]
Downsample = Annotated[
    float | None,
    typer.Option(help="Smaller pictures, the baseline: at most this share of the image tokens."),
]
