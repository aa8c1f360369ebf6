"""Options that several commands take, with one wording."""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from dynamic_llava import methods


def _listed(names: Sequence[str]) -> str:
    """Return names as a sentence has them: "a, b or c"."""
    return ", ".join(names[:-1]) + f" or {names[-1]}"


Json = Annotated[bool, typer.Option("--json", help="Print one JSON object as the last line of stdout.")]
Output = Annotated[
    Path | None, typer.Option(metavar="FILE", help="Write the result as JSON.", show_default=False)
]
Model = Annotated[
    str, typer.Option("--model", metavar="DIR_OR_ID", help="Checkpoint folder, hub id, or nano.")
]


class DType(StrEnum):
    """What a model computes in."""

    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"


Device = Annotated[
    str | None,
    typer.Option(
        "--device", help="cpu, cuda, cuda:N. Default: the accelerator if there is one.", show_default=False
    ),
]
Dtype = Annotated[
    DType | None,
    typer.Option(
        "--dtype",
        help="What it computes in. Default: float32 on a CPU, else the checkpoint's own.",
        show_default=False,
    ),
]
Dense = Annotated[bool, typer.Option("--dense", help="Without the sparsifier: the stock model.")]
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
    str | None, typer.Option(help=f"What drops image tokens: {_listed(methods.names('image'))}.")
]
TextPolicy = Annotated[
    str | None, typer.Option(help=f"What drops output tokens: {_listed(methods.names('output'))}.")
]
Downsample = Annotated[
    float | None,
    typer.Option(help="Smaller pictures, the baseline: at most this share of the image tokens."),
]
