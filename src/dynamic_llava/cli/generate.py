"""``dynamic-llava generate``: one prompt about any picture."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dynamic_llava.cli.model import ANSWERED, chosen, prepared
from dynamic_llava.cli.options import (
    ChosenModel,
    Dense,
    Device,
    Downsample,
    Dtype,
    ImagePolicy,
    Json,
    OtherImageKeepRate,
    OtherTextKeepRate,
    TextPolicy,
)
from dynamic_llava.cli.output import print_json


def command(
    image: Annotated[
        list[Path],
        typer.Option(help="File of a picture, or the name of a bundled one; repeat it for several."),
    ],
    prompt: Annotated[
        str, typer.Option(help="Question or request. <image> may mark where each picture belongs.")
    ],
    model: ChosenModel = None,
    device: Device = None,
    dtype: Dtype = None,
    dense: Dense = False,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer in tokens.")] = 256,
    image_keep_rate: OtherImageKeepRate = None,
    text_keep_rate: OtherTextKeepRate = None,
    image_policy: ImagePolicy = None,
    text_policy: TextPolicy = None,
    downsample: Downsample = None,
    as_json: Json = False,
) -> None:
    """Answer one prompt about one or more pictures; words are shown as they are generated.

    Example: dynamic-llava generate --image scene-1 --prompt "How many objects are there?"
    """
    from dynamic_llava.chat.images import bundled, is_drawn, open_image

    named = {} if all(path.exists() for path in image) else bundled()
    paths = [path if path.exists() else named.get(str(path), path) for path in image]
    pictures = [open_image(path) for path in paths]  # judged before the slow loading of a checkpoint

    from transformers import TextStreamer

    from dynamic_llava.chat.asking import ask

    drawn = all(map(is_drawn, paths))
    answering = chosen(model, drawn)
    with prepared(
        answering,
        device,
        dtype,
        dense,
        downsample,
        image_keep_rate=image_keep_rate,
        text_keep_rate=text_keep_rate,
        image_policy=image_policy,
        text_policy=text_policy,
    ) as (loaded, processor):
        streamer = (
            None if as_json else TextStreamer(processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
        )
        reply = ask(loaded, processor, prompt, pictures, max_new_tokens, streamer)
    if model is None and not drawn:
        typer.echo(ANSWERED[answering], err=True)
    if as_json:
        summary = {} if reply.report is None else reply.report.summary()
        print_json({"answer": reply.text, "output_token_ids": reply.token_ids, **summary})
