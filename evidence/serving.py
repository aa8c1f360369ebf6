"""Load a server with chats by OpenAI's own client, and compare every answer with its lone one.

Chats of 0 to 3 pictures, long and short, some with keep rates of their own, some dense, so many streams at
once; some clients leave in the midst of an answer. The chats are asked again and again until time is over.
Needs the package openai. Without an address it starts ``dynamic-llava serve`` with nano and vLLM itself, in
the environment of make check-vllm; ten minutes on two cores, of which five are under load:

    python -m evidence.serving --output evidence/results/serving.json

A server that runs already must serve nano in float32:

    python -m evidence.serving http://127.0.0.1:8000/v1 --seconds 60
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import json
import random
import re
import shlex
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from evidence.revisions import described
from PIL import Image
from rich.console import Console
from rich.progress import track

from dynamic_llava.chat.asking import encode, greedy
from dynamic_llava.chat.prompt import apply_template
from dynamic_llava.checkpoints import load_with_processor
from dynamic_llava.data import scenes
from dynamic_llava.environment import environment
from dynamic_llava.files import write_json
from dynamic_llava.vllm.rates import changed
from evidence import serving_process

TEXTS = ("Describe the picture.", "How many objects are there?", "What color is the largest object?")
RATES: list[dict[str, Any]] = [{}, {}, {"image_keep_rate": 0.4}, {"text_keep_rate": 0.25}, {"dense": True}]
LEAVES = 20  # one of so many clients leaves after a few words


@dataclass(frozen=True)
class Chat:
    """What a client asks, and the answer of transformers' ``generate`` to it alone."""

    text: str
    pictures: Sequence[Image.Image]
    longest: int
    sparsity: dict[str, Any]
    answer: str = ""


@dataclass
class Found:
    """What came of the chats."""

    right: int = 0
    wrong: list[dict[str, Any]] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)
    left: int = 0
    first_seconds: list[float] = field(default_factory=list)
    tokens: int = 0


def draw(count: int, seed: int = 0) -> list[Chat]:
    """Draw chats."""
    rng = random.Random(seed)
    drawn = []
    for number in range(count):
        pictures = [scenes.scene(rng.randrange(10_000), "heldout").draw() for _ in range(rng.randint(0, 3))]
        drawn.append(Chat(rng.choice(TEXTS), pictures, rng.randint(1, 60), RATES[number % len(RATES)]))
    return drawn


def turns(chat: Chat) -> list[dict[str, Any]]:
    """Return a chat as templates take it."""
    parts: list[dict[str, Any]] = [{"type": "image"} for _ in chat.pictures]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": chat.text}]}]


def answered(chats: Sequence[Chat]) -> list[Chat]:
    """Return the chats with the answers of ``generate`` to each alone."""
    model, processor = load_with_processor("nano", dtype=torch.float32)
    sparsifier: Any = model.sparsifier
    trained, found = sparsifier.config, []
    for chat in track(chats, "answering alone", console=Console(stderr=True), transient=True):
        sparsifier.config = changed(trained, chat.sparsity)
        prompt = apply_template(processor, turns(chat), add_generation_prompt=True)
        tokens = greedy(model, encode(processor, [prompt], list(chat.pictures)), chat.longest)[0].tolist()
        text = processor.decode(tokens, skip_special_tokens=True)
        found.append(replace(chat, answer=text))
    return found


def messages(chat: Chat) -> list[dict[str, Any]]:
    """Return a chat as OpenAI's API takes it."""
    parts: list[dict[str, Any]] = []
    for picture in chat.pictures:
        data = BytesIO()
        picture.save(data, "PNG")
        url = "data:image/png;base64," + base64.b64encode(data.getvalue()).decode()
        parts.append({"type": "image_url", "image_url": {"url": url}})
    return [{"role": "user", "content": [*parts, {"type": "text", "text": chat.text}]}]


async def ask(client: Any, model: str, number: int, chat: Chat, found: Found) -> None:
    """Ask one chat, and judge its answer."""
    started, text, first = time.perf_counter(), "", 0.0
    try:
        stream = await client.chat.completions.create(
            model=model, messages=messages(chat), max_tokens=chat.longest, temperature=0, stream=True,
            extra_body={"sparsity": chat.sparsity} if chat.sparsity else None,
        )  # fmt: skip
        async for piece in stream:
            said = piece.choices[0].delta.content if piece.choices else None
            if said:
                first = first or time.perf_counter() - started
                text += said
                found.tokens += 1
            if number % LEAVES == LEAVES - 1 and len(text) > 20:
                await stream.close()
                found.left += 1
                return
    except Exception as error:  # whatever it is, the answer is lost
        found.lost.append(f"{number}: {type(error).__name__}: {error}"[:200])
        return
    found.first_seconds.append(first)
    if text.strip() == chat.answer.strip():
        found.right += 1
    else:
        found.wrong.append({"chat": number, "said": text, "alone": chat.answer})


async def load(
    address: str, key: str, chats: Sequence[Chat], streams: int, seconds: float, most: int | None = None
) -> dict[str, Any]:
    """Ask chats over and over, so many at once, until the time is over or so many are asked."""
    from openai import AsyncOpenAI

    client, found, asked = AsyncOpenAI(base_url=address, api_key=key or "none", max_retries=0), Found(), 0
    model = (await client.models.list()).data[0].id
    started = time.perf_counter()

    async def work() -> None:
        nonlocal asked
        while time.perf_counter() - started < seconds and (most is None or asked < most):
            number, asked = asked, asked + 1
            await ask(client, model, number, chats[number % len(chats)], found)

    await asyncio.gather(*(work() for _ in range(streams)))
    took = time.perf_counter() - started
    return {
        "streams": streams, "different_chats": len(chats), "asked": asked, "right": found.right,
        "wrong": found.wrong, "lost": found.lost, "left_by_their_clients": found.left, "seconds": took,
        "requests_per_second": found.right / took, "pieces_per_second": found.tokens / took,
        "median_seconds_to_first_piece": statistics.median(found.first_seconds or [0.0]),
    }  # fmt: skip


def load_new_server(chats: Sequence[Chat], streams: int, seconds: float) -> dict[str, Any]:
    """Start a server of nano, load it, and end it."""
    with tempfile.TemporaryDirectory() as folder:
        line = serving_process.vllm_line()
        with serving_process.running(line, Path(folder) / "log") as server:
            numbers = asyncio.run(load(f"{server.address}/v1", "", chats, streams, seconds))
    return numbers | {"server": shlex.join(["dynamic-llava", *line[3:]])}


def main() -> int:
    """Load a server; the exit code is 1 if an answer is wrong or lost."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("address", nargs="?", help="of the API; without it a server is started")
    parser.add_argument("--key", default="", help="what the server asks for")
    parser.add_argument("--requests", type=int, default=200, help="different chats")
    parser.add_argument("--streams", type=int, default=32)
    parser.add_argument("--seconds", type=float, default=300, help="no chat begins after them")
    parser.add_argument("--output", type=Path, help="also write the result to this JSON file")
    options = parser.parse_args()
    chats = answered(draw(options.requests))
    if options.address:
        numbers = asyncio.run(load(options.address, options.key, chats, options.streams, options.seconds))
    else:
        numbers = load_new_server(chats, options.streams, options.seconds)
    print(json.dumps(numbers))
    if options.output:
        given = re.sub(r"--key\S* \S+", "", shlex.join(sys.argv[1:]))
        head = {"command": f"python -m evidence.serving {given}", "commit": described()}
        write_json(options.output, head | {"numbers": numbers} | environment(torch.device("cpu")))
    return int(bool(numbers["wrong"] or numbers["lost"]))


if __name__ == "__main__":
    sys.exit(main())
