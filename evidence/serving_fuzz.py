"""Send a server 10,000 requests that are wrong, broken, cut off or abandoned, and see what is left of it.

From the server's own OpenAPI schema, by schemathesis; chats with any values in any fields; pictures that are
broken or decompression bombs; half of a body; clients that leave. What gets a 5xx is sent once more to stock
vLLM with the same weights and nothing of ours: only what stock answers otherwise is a fault. Between, the
server must answer a chat as before; in the end its memory must be what it was when a fifth had been sent.

Needs the package schemathesis beside the environment of make check-vllm; an hour on two cores:

    python -m evidence.serving_fuzz --output evidence/results/serving-fuzz.json

With ``--engine transformers`` the server without vLLM is shot at, which has no schema.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import shlex
import sys
import tempfile
import time
import urllib.parse
import urllib.request
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from evidence.revisions import described
from evidence.serving_shots import KINDS, PATIENCE, Shot, chat, request
from rich.console import Console

from dynamic_llava.checkpoints import resolve
from dynamic_llava.environment import environment
from dynamic_llava.files import write_json
from evidence import serving_process

AT_ONCE = 12
SHARES = {"schema": 0.3, "body": 0.35, "picture": 0.15, "half": 0.1, "leaver": 0.1}
# Freed memory goes back at once, so that what stays is held, and not the allocator's own.
TRIMMED = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "2"}
WARM = 0.2  # share of the shots after which memory is read for the first time
GROWTH = 0.05


@dataclass
class Seen:
    """What came back."""

    statuses: Counter[str] = field(default_factory=Counter)
    failed: list[tuple[Shot, int]] = field(default_factory=list)
    unanswered: list[str] = field(default_factory=list)
    sent: int = 0

    def note(self, shot: Shot, status: int | None, is_late: bool) -> None:
        """Count what came of a shot."""
        self.sent += 1
        self.statuses[f"{shot.kind}: {status if status else 'left' if is_late else 'closed'}"] += 1
        if status is not None and status >= 500:
            self.failed.append((shot, status))
        if status is None and shot.is_due:
            self.unanswered.append(repr(shot.sent[:200]))


def schema_shots(schema: dict[str, Any], count: int, seed: int) -> Iterator[Shot]:
    """Draw requests from an OpenAPI schema: half of them fit it, half do not."""
    from hypothesis import HealthCheck, Phase, given, settings
    from hypothesis import seed as seeded
    from hypothesis.errors import Unsatisfiable
    from hypothesis.strategies import just
    from schemathesis import GenerationMode, openapi

    operations = [found.ok() for found in openapi.from_dict(schema).get_all_operations()]
    posts = [operation for operation in operations if operation.method.upper() == "POST"]
    each = max(1, count // (2 * len(posts)))
    for operation in posts:
        for mode in (GenerationMode.POSITIVE, GenerationMode.NEGATIVE):
            shots: list[Shot] = []

            def draw(case: Any, into: list[Shot]) -> None:
                into.append(as_shot(case))

            drawing = given(operation.as_strategy(generation_mode=mode), just(shots))(draw)
            options: dict[str, Any] = {"database": None, "deadline": None, "phases": [Phase.generate]}
            options |= {"suppress_health_check": list(HealthCheck), "max_examples": each}
            drawing = settings(**options)(drawing)
            with suppress(Unsatisfiable):  # no request is wrong where everything fits
                seeded(seed)(drawing)()
            yield from shots


def as_shot(case: Any) -> Shot:
    """Return what schemathesis drew, as bytes."""
    import requests

    named = case.as_transport_kwargs(base_url="http://localhost")
    known = ("method", "url", "headers", "json", "data", "params")
    made = requests.Request(**{name: named.get(name) for name in known}).prepare()
    body = made.body.encode() if isinstance(made.body, str) else made.body or b""
    headers = [f"{name}: {value}" for name, value in made.headers.items() if "\n" not in str(value)]
    parts = urllib.parse.urlsplit(str(made.url))
    path = parts.path + (f"?{parts.query}" if parts.query else "")
    return Shot("schema", request(body, path, str(made.method), *headers), leaves=PATIENCE)


async def shoot(port: int, shot: Shot) -> tuple[int | None, bool]:
    """Send a shot; return the status, if one came, and whether the client left before the end."""
    try:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
    except OSError:
        return None, False
    status = None
    try:
        async with asyncio.timeout(shot.leaves):
            writer.write(shot.sent)
            await writer.drain()
            line = await reader.readline()
            words = line.split()
            status = int(words[1]) if len(words) > 1 and words[0].startswith(b"HTTP/") else None
            while await reader.read(1 << 16):
                pass
    except TimeoutError:
        return status, True
    except OSError:
        return status, False
    else:
        return status, False
    finally:
        writer.transport.abort()


async def shoot_all(port: int, shots: Sequence[Shot], seen: Seen) -> None:
    """Send shots, several at once."""
    waiting = iter(shots)

    async def work() -> None:
        for shot in waiting:
            seen.note(shot, *await shoot(port, shot))

    await asyncio.gather(*(work() for _ in range(AT_ONCE)))


def sane_answer(address: str) -> str:
    """Return what the server says to a good chat."""
    body = json.dumps(chat([], max_tokens=8, temperature=0)).encode()
    asked = urllib.request.Request(
        f"{address}/v1/chat/completions", body, {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(asked, timeout=PATIENCE) as answer:
        return str(json.load(answer)["choices"][0]["message"]["content"])


def idle_bytes(server: serving_process.Server) -> dict[str, int]:
    """Return the server's memory once it has come to rest."""
    time.sleep(5)
    return server.resident_bytes()


def total(memory: dict[str, int]) -> int:
    """Return the memory of all processes."""
    return sum(memory.values())


def attack(server: serving_process.Server, shots: list[Shot]) -> dict[str, Any]:
    """Send all shots, and look at the server between."""
    seen, first = Seen(), sane_answer(server.address)
    warm = int(len(shots) * WARM)
    parts = [shots[:warm], *(shots[start : start + 500] for start in range(warm, len(shots), 500))]
    memory: list[dict[str, int]] = []
    for part in parts:
        asyncio.run(shoot_all(server.port, part, seen))
        if sane_answer(server.address) != first:
            raise RuntimeError("the server answers a good chat otherwise than before")
        memory.append(idle_bytes(server))
        Console(stderr=True).print(f"{seen.sent} sent, {len(seen.failed)} failed, {memory[-1]}")
    return {
        "sent": seen.sent, "statuses": dict(sorted(seen.statuses.items())), "unanswered": seen.unanswered,
        "memory_bytes": memory, "memory_growth": total(memory[-1]) / total(memory[0]) - 1,
        "failed": seen.failed,
    }  # fmt: skip


def compared(failed: Sequence[tuple[Shot, int]], port: int) -> tuple[Counter[str], list[dict[str, Any]]]:
    """Send what failed to stock vLLM; return how both answered, and what failed with us alone."""
    counted: Counter[str] = Counter()
    ours: list[dict[str, Any]] = []
    for shot, status in failed:
        stock, is_late = asyncio.run(shoot(port, shot))
        counted[f"{status}, stock {stock or ('left' if is_late else 'closed')}"] += 1
        if stock is None or stock < 500:
            ours.append({"status": status, "stock": stock, "sent": repr(shot.sent[:3000])})
    return counted, ours


def drawn(schema: dict[str, Any] | None, count: int, seed: int) -> list[Shot]:
    """Draw the shots, mixed."""
    rng = random.Random(seed)
    shares = SHARES if schema is not None else {kind: SHARES[kind] for kind in KINDS}
    total = sum(shares.values())
    shots: list[Shot] = list(schema_shots(schema, int(count * shares["schema"]), seed)) if schema else []
    for kind in KINDS:
        shots += islice(KINDS[kind](random.Random(rng.random())), int(count * shares[kind] / total))
    shots += islice(KINDS["body"](rng), max(0, count - len(shots)))
    rng.shuffle(shots)
    return shots[:count]


def transformers_line() -> list[str]:
    """Return the command of the server without vLLM."""
    options = ["--engine", "transformers", "--device", "cpu", "--dtype", "float32", "--port"]
    return [sys.executable, "-m", "dynamic_llava", "serve", *options, str(serving_process.free_port())]


def run(engine: str, count: int, seed: int, folder: Path) -> dict[str, Any]:
    """Shoot at a server of an engine, and compare what failed with stock vLLM."""
    has_vllm = engine == "vllm"
    # Without vLLM's cache of pictures, which would grow to 4 GiB.
    options = (*serving_process.SMALL, "--mm-processor-cache-gb=0")
    line = serving_process.vllm_line(options) if has_vllm else transformers_line()
    with serving_process.running(line, folder / "log", **TRIMMED) as server:
        schema = None
        if has_vllm:
            with urllib.request.urlopen(f"{server.address}/openapi.json") as answer:
                schema = json.load(answer)
        numbers = attack(server, drawn(schema, count, seed))
        failed = numbers.pop("failed")
    numbers |= {"server": shlex.join(["dynamic-llava", *line[3:]]), "around": TRIMMED}
    numbers |= {"failed": len(failed)}
    if not failed or not has_vllm:
        worst = [{"status": status, "sent": repr(shot.sent[:3000])} for shot, status in failed]
        return numbers | {"failed_with_us_alone": worst}
    from evidence import serving_engine

    stock = serving_engine.stock_copy(resolve("nano"), folder / "stock")
    with serving_process.running(serving_process.stock_line(stock, options), folder / "stock-log") as server:
        counted, ours = compared(failed, server.port)
    return numbers | {"failed_by_status": dict(counted), "failed_with_us_alone": ours}


def main() -> int:
    """Attack a server; the exit code is 1 if anything failed with us alone, hung, or made it grow."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--engine", choices=("vllm", "transformers"), default="vllm")
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, help="also write the result to this JSON file")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        numbers = run(options.engine, options.requests, options.seed, Path(folder))
    print(json.dumps(numbers))
    if options.output:
        head = {
            "command": f"python -m evidence.serving_fuzz {shlex.join(sys.argv[1:])}",
            "commit": described(),
        }
        write_json(options.output, head | {"numbers": numbers} | environment(torch.device("cpu")))
    bad = numbers["failed_with_us_alone"] or numbers["unanswered"] or numbers["memory_growth"] > GROWTH
    return int(bool(bad))


if __name__ == "__main__":
    sys.exit(main())
