"""The command line ``dynamic-llava``: a function a command.

Answers and JSON go to stdout, progress and remarks to stderr. A user's mistake ends with exit code 2 and one
line. The heavy imports sit inside the commands, so that ``--help`` answers at once.
"""

from __future__ import annotations

import json
import shlex
import sys
from contextlib import AbstractContextManager, nullcontext
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dynamic_llava.cli.bench import bench
from dynamic_llava.cli.flops import flops
from dynamic_llava.cli.options import (
    Downsample,
    ImagePolicy,
    Json,
    OtherImageKeepRate,
    OtherTextKeepRate,
    TextPolicy,
)
from dynamic_llava.cli.usage import Commands

if TYPE_CHECKING:
    from transformers import PreTrainedModel, ProcessorMixin


app = typer.Typer(cls=Commands, rich_markup_mode=None, add_completion=False)
app.command()(flops)
app.command()(bench)


class Format(StrEnum):
    """What `convert` writes."""

    TRANSFORMERS = "transformers"
    OFFICIAL = "official"


class Task(StrEnum):
    """What `evaluate` measures."""

    EASY_VQA = "easy-vqa"
    SCENES = "scenes"
    DESCRIPTIONS = "descriptions"
    GENERATION = "generation"


class Attention(StrEnum):
    """Attention implementations that a sparsifier works with."""

    SDPA = "sdpa"
    EAGER = "eager"


Model = Annotated[
    str, typer.Option("--model", metavar="DIR_OR_ID", help="Checkpoint folder, hub id, or nano.")
]
Dense = Annotated[bool, typer.Option("--dense", help="Without the sparsifier: the stock model.")]


@app.callback()
def common(
    traceback: Annotated[bool, typer.Option(help="Show where an error arose, not just one line.")] = False,
) -> None:
    """Ask pictures questions with a sparse context: Dynamic-LLaVA."""


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for the pictures of what was kept.")] = Path("demo"),
    model: Model = "nano",
    as_json: Json = False,
) -> None:
    """Answer bundled questions dense and sparse, and show what the sparse context kept and saved.

    Example: dynamic-llava demo --out demo
    """
    from rich.console import Console

    from dynamic_llava.chat import demo as demonstration

    items = demonstration.run(*_load(model), demonstration.requests(), out)
    shown = demonstration.present(items, Console(stderr=as_json))
    if as_json:
        _print_json(demonstration.as_json(shown))


@app.command()
def generate(
    image: Annotated[list[Path], typer.Option(help="A picture; repeat it for several.")],
    prompt: Annotated[str, typer.Option(help="Question or request; <image> may mark the pictures' places.")],
    model: Model = "nano",
    dense: Dense = False,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")] = 256,
    image_keep_rate: OtherImageKeepRate = None,
    text_keep_rate: OtherTextKeepRate = None,
    image_policy: ImagePolicy = None,
    text_policy: TextPolicy = None,
    downsample: Downsample = None,
    as_json: Json = False,
) -> None:
    """Answer one prompt about any picture; the answer streams.

    Example: dynamic-llava generate --image cat.jpg --prompt "What is on the sofa?"
    """
    from dynamic_llava.chat.images import open_image

    pictures = [open_image(path) for path in image]  # judged before the slow loading of a checkpoint

    from transformers import TextStreamer

    from dynamic_llava.chat.ask import ask

    loaded, processor = _load(model)
    _set_dense(loaded, dense)
    _configure(loaded, image_keep_rate, text_keep_rate, image_policy, text_policy)
    streamer = (
        None if as_json else TextStreamer(processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
    )
    with _looking(loaded, processor, downsample) as processor:
        reply = ask(loaded, processor, prompt, pictures, max_new_tokens, streamer)
    if as_json:
        summary = {} if reply.report is None else reply.report.summary()
        _print_json({"answer": reply.text, "output_token_ids": reply.token_ids, **summary})


@app.command()
def evaluate(
    task: Annotated[Task, typer.Option(help="What to measure.")],
    model: Model = "nano",
    dense: Dense = False,
    image_keep_rate: OtherImageKeepRate = None,
    text_keep_rate: OtherTextKeepRate = None,
    image_policy: ImagePolicy = None,
    text_policy: TextPolicy = None,
    downsample: Downsample = None,
    data: Annotated[
        Path | None,
        typer.Option(help="generation: JSON or JSONL with reference answers.", show_default=False),
    ] = None,
    images: Annotated[
        Path | None, typer.Option(help="generation: folder of the pictures.", show_default=False)
    ] = None,
    max_new_tokens: Annotated[
        int | None,
        typer.Option(min=1, help="generation: longest answer. Default: 1024.", show_default=False),
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Ask only the first N questions.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Questions answered at once.")] = 64,
    seed: Annotated[int, typer.Option(help="Seed of random dropping.")] = 0,
    output: Annotated[
        Path | None,
        typer.Option(help="Result file; default: evidence/results/ where the current folder has one."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Measure accuracy on easy-VQA or held-out scenes, or the quality and cost of long answers.

    Example: dynamic-llava evaluate --model nano --task easy-vqa
    """
    from rich.console import Console

    from dynamic_llava import evaluation
    from dynamic_llava.files import write_json

    loaded, processor = _load(model)
    _set_dense(loaded, dense)
    changed = _configure(loaded, image_keep_rate, text_keep_rate, image_policy, text_policy)
    with _looking(loaded, processor, downsample) as processor:
        measured = evaluation.evaluate(
            loaded,
            processor,
            task,
            limit=limit,
            batch_size=batch_size,
            seed=seed,
            data=data,
            images=images,
            max_new_tokens=max_new_tokens,
        )
    command = shlex.join(["dynamic-llava", *sys.argv[1:]])
    result = {"command": command, "model": model, "dense": dense, "downsample": downsample, **measured}
    changed = changed or downsample is not None
    path = output or (None if changed else evaluation.default_output(task, model, dense, limit))
    if path is not None:
        write_json(path, result)
        typer.echo(f"written: {path}", err=True)
    if as_json:
        _print_json(result)
    else:
        Console().print(evaluation.table(result["numbers"]))


@app.command()
def train(
    recipe: Annotated[Path, typer.Argument(help="A recipe; the shipped ones are in recipes/.")],
    resume: Annotated[bool, typer.Option("--resume", help="Continue from the last checkpoint.")] = False,
    dry: Annotated[
        bool, typer.Option("--dry-run", help="Only show parameters, tokens, steps and memory.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Train one stage as its recipe says; on several GPUs, with accelerate launch -m dynamic_llava train.

    Example: dynamic-llava train recipes/nano-dense.yaml --dry-run
    """
    from dynamic_llava.training import run

    if not dry:
        folder = run.train(recipe, resume=resume)
        _print_json({"model": str(folder)}) if as_json else typer.echo(folder)
        return
    plan = run.dry_run(recipe)
    if as_json:
        _print_json(plan.as_json())
        return
    from rich.console import Console

    for table in plan.tables():
        Console().print(table)


@app.command()
def convert(
    source: Annotated[str, typer.Argument(help="Checkpoint folder or hub id.", metavar="SRC")],
    out: Annotated[Path, typer.Argument(help="Folder of the result.")],
    to: Annotated[
        Format, typer.Option("--to", help="Format of the result; the source is in the other one.")
    ] = Format.TRANSFORMERS,
    dtype: Annotated[
        str | None, typer.Option(help="float32, float16 or bfloat16; else as it is.", show_default=False)
    ] = None,
    vision_tower: Annotated[
        str | None, typer.Option(help="The tower's folder or hub id, if not where the checkpoint says.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Convert between the official format (LLaVA-1.5, Dynamic-LLaVA) and transformers', shard by shard.

    Example: dynamic-llava convert liuhaotian/llava-v1.5-7b llava-7b
    """
    from dataclasses import asdict

    import torch
    from rich.console import Console
    from rich.progress import Progress

    from dynamic_llava.checkpoints import convert as run

    dtypes = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
    if dtype is not None and dtype not in dtypes:
        raise ValueError(f"--dtype is {dtype!r}: choose float32, float16 or bfloat16")
    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("converting", total=None)
        done = run(
            source,
            out,
            to.value,
            dtypes[dtype] if dtype else None,
            vision_tower,
            progress=lambda count, total: bar.update(task, completed=count, total=total),
        )
    if as_json:
        _print_json(asdict(done) | {"folder": str(done.folder)})
    else:
        beside = " and its sparsifier" if done.has_sparsifier else ""
        typer.echo(f"{done.folder}: {done.tensors} tensors{beside}, {done.bytes / 1e6:,.1f} MB")


@app.command()
def verify(
    folder: Annotated[
        Path, typer.Argument(metavar="DIR", help="Golden files beside their checkpoint/, or folders of such.")
    ],
    attention: Annotated[Attention, typer.Option(help="Attention of the models.")] = Attention.SDPA,
    as_json: Json = False,
) -> None:
    """Compare the library with golden vectors of the official code; exit code 1 if anything differs.

    Example: dynamic-llava verify golden
    """
    from rich.console import Console
    from rich.progress import track

    from dynamic_llava import verification

    bar = Console(stderr=True)
    results = verification.verify(
        folder, attention, track=lambda files: track(files, "verifying", console=bar, transient=True)
    )
    outcome = verification.as_json(results)
    if as_json:
        _print_json(outcome)
    else:
        Console().print(verification.table(results))
        typer.echo(", ".join(f"{count} {status}" for status, count in outcome["counts"].items()))
    if not outcome["passed"]:
        raise typer.Exit(1)


def main() -> None:
    """Run the command line."""
    app()


def _load(source: str) -> tuple[PreTrainedModel, ProcessorMixin]:
    """Load what a command asks questions with."""
    import dynamic_llava

    model, processor = dynamic_llava.load(source)
    if processor is None:
        raise ValueError(
            f"{source}: the checkpoint has no tokenizer or processor; save the model's own beside it"
        )
    return model, processor


def _set_dense(model: PreTrainedModel, dense: bool) -> None:
    """Detach the sparsifier if ``dense``; say so where there is none and nobody asked for dense answers."""
    sparsifier = getattr(model, "sparsifier", None)
    if dense and sparsifier is not None:
        sparsifier.detach()
    elif not dense and sparsifier is None:
        typer.echo("note: the checkpoint has no sparsifier, so it answers dense", err=True)


def _looking(
    model: PreTrainedModel, processor: ProcessorMixin, rate: float | None
) -> AbstractContextManager[ProcessorMixin]:
    """Return a context that yields the processor to ask with: for smaller pictures if there is a rate."""
    if rate is None:
        return nullcontext(processor)
    from dynamic_llava.methods.downsample import downsampled

    return downsampled(model, processor, rate)


def _configure(
    model: PreTrainedModel,
    image_keep_rate: float | None = None,
    text_keep_rate: float | None = None,
    image_policy: str | None = None,
    text_policy: str | None = None,
) -> bool:
    """Change what the sparsifier drops, as the options of the same names say; return whether they do."""
    from dataclasses import replace

    given = {
        "image_keep_rate": image_keep_rate,
        "text_keep_rate": text_keep_rate,
        "image_policy": image_policy,
        "text_policy": text_policy,
    }
    changes: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    if not changes:
        return False
    sparsifier = getattr(model, "sparsifier", None)
    if sparsifier is None:
        options = ", ".join("--" + name.replace("_", "-") for name in changes)
        raise ValueError(f"{options}: the model answers dense; leave it out, or take a sparse checkpoint")
    sparsifier.config = replace(sparsifier.config, **changes)
    return True


def _print_json(content: dict[str, Any]) -> None:
    typer.echo(json.dumps(content, ensure_ascii=False))
