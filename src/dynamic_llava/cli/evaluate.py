"""``dynamic-llava evaluate``: accuracy, and the quality and cost of long answers."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from dynamic_llava.cli.model import prepared
from dynamic_llava.cli.options import (
    Dense,
    Device,
    Downsample,
    Dtype,
    ImagePolicy,
    Json,
    Model,
    OtherImageKeepRate,
    OtherTextKeepRate,
    Output,
    TextPolicy,
)
from dynamic_llava.cli.output import command_line, print_json, say_written
from dynamic_llava.files import check_file, write_json


class Task(StrEnum):
    """What is measured."""

    EASY_VQA = "easy-vqa"
    SCENES = "scenes"
    DESCRIPTIONS = "descriptions"
    FLICKR8K = "flickr8k"
    DAQUAR = "daquar"
    LONG_ANSWERS = "long-answers"
    GENERATION = "generation"


def command(
    task: Annotated[Task, typer.Option(help="What to measure.")],
    model: Model = "nano",
    device: Device = None,
    dtype: Dtype = None,
    dense: Dense = False,
    image_keep_rate: OtherImageKeepRate = None,
    text_keep_rate: OtherTextKeepRate = None,
    image_policy: ImagePolicy = None,
    text_policy: TextPolicy = None,
    downsample: Downsample = None,
    data: Annotated[
        Path | None,
        typer.Option(help="flickr8k, daquar, long-answers: JSON or JSONL file.", show_default=False),
    ] = None,
    images: Annotated[
        Path | None, typer.Option(help="long-answers: folder of the pictures.", show_default=False)
    ] = None,
    max_new_tokens: Annotated[
        int | None,
        typer.Option(
            min=1, help="Tasks with --data: longest answer. Default: 40, 24, 1024.", show_default=False
        ),
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Ask only the first N questions.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Number of questions answered at once.")] = 64,
    seed: Annotated[int, typer.Option(help="Seed of random choices.")] = 0,
    output: Output = None,
    sheet: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Also show 24 of the pictures with what was kept, answered dense and sparse: HTML.",
            show_default=False,
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Measure accuracy on easy-VQA or held-out scenes, captions, or the quality and cost of long answers.

    Each answer with its scores goes into the file of --output. generation is another name of long-answers.

    Example: dynamic-llava evaluate --task scenes --limit 100
    """
    for option, path in (("--output", output), ("--sheet", sheet)):
        if path is not None:
            check_file(option, path)

    from rich.console import Console

    from dynamic_llava import evaluation
    from dynamic_llava.evaluation import sheet as sheets

    with prepared(
        model,
        device,
        dtype,
        dense,
        downsample,
        image_keep_rate=image_keep_rate,
        text_keep_rate=text_keep_rate,
        image_policy=image_policy,
        text_policy=text_policy,
    ) as (loaded, processor):
        if sheet is not None:
            sheets.check(loaded)
        given: dict[str, Any] = {"limit": limit, "data": data, "images": images}
        given["max_new_tokens"] = max_new_tokens
        measured = evaluation.evaluate(loaded, processor, task, batch_size=batch_size, seed=seed, **given)
        if sheet is not None:
            questions = evaluation.asked(task, **given)
            longest = evaluation.longest_answer(task, max_new_tokens)
            sheets.write(sheet, loaded, processor, questions, longest, f"{model}: {task}")
            say_written(sheet)
    result = {"command": command_line(), "model": model, "dense": dense, "downsample": downsample, **measured}
    if output is not None:
        write_json(output, result)
        say_written(output)
    if as_json:
        print_json(evaluation.without_examples(result))
    else:
        Console().print(evaluation.table(result["numbers"]))
