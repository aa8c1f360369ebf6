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


Json = Annotated[bool, typer.Option("--json", help="End the output with one line that is a JSON object.")]
Output = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="Write the result to this file, as JSON.", show_default=False),
]
Model = Annotated[
    str,
    typer.Option(
        "--model", metavar="DIR_OR_ID", help="Folder of a checkpoint, its name on the hub, or nano."
    ),
]
ChosenModel = Annotated[
    str | None,
    typer.Option(
        "--model",
        metavar="DIR_OR_ID",
        help="Folder of a checkpoint, its name on the hub, nano or photo. Default: photo for photographs, "
        "where it is installed, and nano.",
        show_default=False,
    ),
]


class DType(StrEnum):
    """What a model computes in."""

    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"


Device = Annotated[
    str | None,
    typer.Option(
        "--device", help="cpu, cuda or cuda:N. Default: the accelerator, if there is one.", show_default=False
    ),
]
Dtype = Annotated[
    DType | None,
    typer.Option(
        "--dtype",
        help="Type to compute in. Default: float32 on a CPU, otherwise that of the checkpoint.",
        show_default=False,
    ),
]
Dense = Annotated[bool, typer.Option("--dense", help="Detach the sparsifier, so that nothing is dropped.")]
ImageKeepRate = Annotated[float, typer.Option(help="Share of the image tokens to keep, in (0, 1].")]
TextKeepRate = Annotated[float, typer.Option(help="Share of the output tokens to keep, in (0, 1].")]
Layer = Annotated[int, typer.Option(help="First layer that works without the dropped tokens.")]
TextTokens = Annotated[int, typer.Option(help="Number of text tokens in the prompt.")]
OtherImageKeepRate = Annotated[
    float | None,
    typer.Option("--image-keep-rate", help="Share of the image tokens to keep. Default: as trained."),
]
OtherTextKeepRate = Annotated[
    float | None,
    typer.Option("--text-keep-rate", help="Share of the output tokens to keep. Default: as trained."),
]
ImagePolicy = Annotated[
    str | None,
    typer.Option(help=f"Method that chooses the image tokens to keep: {_listed(methods.names('image'))}."),
]
TextPolicy = Annotated[
    str | None,
    typer.Option(help=f"Method that chooses the output tokens to keep: {_listed(methods.names('output'))}."),
]
Downsample = Annotated[
    float | None,
    typer.Option(help="Shrink the pictures instead, to at most this share of the image tokens: a baseline."),
]
