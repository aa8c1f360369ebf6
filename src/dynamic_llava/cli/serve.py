"""``dynamic-llava serve``: OpenAI's API and a page to look with."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Mapping
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from dynamic_llava.cli.model import load
from dynamic_llava.cli.options import Device, Dtype, Model
from dynamic_llava.page.limits import Limits

DRAIN = 120
"""Seconds that vLLM gives answers under way when it is told to end."""


class Engine(StrEnum):
    """What computes the answers."""

    AUTO = "auto"
    VLLM = "vllm"
    TRANSFORMERS = "transformers"


def command(
    options: Annotated[
        list[str] | None, typer.Argument(help="Further options for vLLM, after --.", show_default=False)
    ] = None,
    model: Model = "nano",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port; 0 takes a free one.")] = 8000,
    host: Annotated[str, typer.Option(help="Address to listen at; 0.0.0.0 is all of them.")] = "127.0.0.1",
    engine: Annotated[Engine, typer.Option(help="auto: vLLM where it is installed.")] = Engine.AUTO,
    api_key: Annotated[
        str, typer.Option(envvar="DYNAMIC_LLAVA_API_KEY", help="What clients must send.", show_default=False)
    ] = "",
    allow_picture_host: Annotated[
        list[str] | None, typer.Option(help="A host to fetch pictures from; repeat it.", show_default=False)
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer, without vLLM.")] = 512,
    device: Device = None,
    dtype: Dtype = None,
) -> None:
    """Serve a checkpoint by OpenAI's API, and a page at / that shows what is kept.

    With vLLM installed it is the engine; else plain transformers answer, one request at a time: to look with.

    Example: dynamic-llava serve --model nano --port 8000
    """
    has_vllm = importlib.util.find_spec("vllm") is not None
    hosts = tuple(allow_picture_host or ())
    if engine is Engine.VLLM and not has_vllm:
        raise ValueError("--engine vllm: vLLM is not installed; see docs/serving.md")
    if importlib.util.find_spec("starlette") is None or importlib.util.find_spec("uvicorn") is None:
        raise ValueError('serve needs a web server: pip install "dynamic-llava[serve]"')
    if has_vllm and engine is not Engine.TRANSFORMERS:
        line = vllm_command(model, host, port, hosts, dtype, options or [])
        os.execve(line[0], line, vllm_environment(os.environ, api_key))  # it then gets this process's signals
    if options:
        raise ValueError(f"{options[0]}: without vLLM there are no further options")
    import uvicorn

    from dynamic_llava.page import app
    from dynamic_llava.page.engine import Engine as Answering

    loaded, processor = load(model, device, dtype)
    limits = Limits(picture_hosts=hosts, new_tokens=max_new_tokens)
    answering = Answering(loaded, processor, model_name(model), limits.waiting)
    typer.echo("note: transformers answer, one request at a time; for more install vLLM", err=True)
    config = uvicorn.Config(
        app.build(answering, limits, api_key), host=host, port=port, log_level="info", server_header=False
    )
    uvicorn.Server(config).run()


def vllm_command(
    model: str,
    host: str,
    port: int,
    hosts: tuple[str, ...],
    dtype: Any,
    options: list[str],
) -> list[str]:
    """Return the command line of vLLM's own server, with the page beside it; the key goes another way."""
    from dynamic_llava.checkpoints import Source

    source = Source(model)
    if source.kind != "stock":
        raise ValueError(
            f"{model} is a checkpoint of kind {source.kind}: convert it first, vLLM cannot read it"
        )
    line = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(source.folder)]
    line += ["--served-model-name", model_name(model), "--host", host, "--port", str(port)]
    line += ["--middleware", "dynamic_llava.page.beside_vllm.Beside"]
    # It fetches pictures from everywhere unless it is told from where: from nowhere is not among its choices.
    line += ["--allowed-media-domains", *(hosts or ("none.invalid",))]
    line += ["--shutdown-timeout", str(DRAIN)]  # or it cuts answers off
    line += ["--dtype", dtype] if dtype else []
    return line + options


def model_name(model: str) -> str:
    """Return what clients call a model: a hub id as it is, of a folder the last name."""
    return Path(model).resolve().name if Path(model).is_dir() else model


def vllm_environment(around: Mapping[str, str], api_key: str) -> dict[str, str]:
    """Return the environment of vLLM's server: bounds on pictures, and the key, for all can read commands."""
    key = {"VLLM_API_KEY": api_key} if api_key else {}
    largest = {"VLLM_MAX_IMAGE_PIXELS": str(Limits().pixels)}
    return {**largest, **around, "VLLM_MEDIA_URL_ALLOW_REDIRECTS": "0", **key}
