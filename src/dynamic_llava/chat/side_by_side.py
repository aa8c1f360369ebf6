"""Bundled pictures, answered dense and sparse side by side, with what the sparse context kept and saved."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib.resources import as_file, files
from pathlib import Path

from PIL import Image
from rich.console import Console, Group
from rich.panel import Panel
from rich.table import Table
from rich.text import Text
from transformers import PreTrainedModel, ProcessorMixin

from dynamic_llava.chat.asking import Reply, ask, dense
from dynamic_llava.chat.images import PHOTOGRAPH, bundled, open_image
from dynamic_llava.chat.view import as_seen, marked, overlay, pieces, save_overlay
from dynamic_llava.sparsifier import sparsifier_of

MAX_NEW_TOKENS = 256
DESCRIBE = "Describe the picture in one sentence."
COUNTS = (
    "image_tokens", "image_tokens_kept", "output_tokens", "output_tokens_kept",
    "kv_bytes", "kv_bytes_dense", "prefill_flops", "prefill_flops_dense",
)  # fmt: skip


@dataclass(frozen=True)
class Request:
    """One bundled picture with a question and its right answer; photographs have no single one."""

    picture: str
    question: str
    expected: str | None = None


@dataclass(frozen=True)
class Item:
    """One answered request; counts are tokens, sizes are bytes, work is floating-point operations.

    ``output_tokens`` counts the generated tokens that were fed back: those whose K/V can be dropped;
    ``output_words`` and ``output_words_kept`` are the pieces of the answer and the decision on each of them.
    """

    picture: str
    question: str
    answer: str
    answer_dense: str
    expected: str | None
    image_tokens: int
    image_tokens_kept: int
    output_tokens: int
    output_tokens_kept: int
    kv_bytes: int
    kv_bytes_dense: int
    prefill_flops: int
    prefill_flops_dense: int
    overlay: str
    output_words: tuple[str, ...]
    output_words_kept: tuple[bool, ...]


def requests() -> list[Request]:
    """Read the bundled requests; ``assets/README.md`` says where the pictures come from."""
    listed = json.loads((files("dynamic_llava") / "assets" / "demo.json").read_text(encoding="utf-8"))
    return [Request(**entry) for entry in listed]


def photographs() -> list[Request]:
    """Return requests to describe every bundled photograph."""
    names = sorted(path.name for path in bundled().values() if path.suffix == PHOTOGRAPH)
    return [Request(name, DESCRIBE) for name in names]


def run(
    model: PreTrainedModel, processor: ProcessorMixin, asked: Sequence[Request], folder: Path
) -> Iterator[Item]:
    """Answer each request dense and sparse, and write its overlay to ``folder``.

    Raises
    ------
    ValueError
        The model has no sparsifier, so there is nothing to show.
    """
    if sparsifier_of(model) is None:
        raise ValueError(
            "the checkpoint has no sparsifier, and the demo compares with and without; use --model nano"
        )
    for number, request in enumerate(asked, start=1):
        yield _answer(model, processor, request, folder / f"{number:02d}-{Path(request.picture).stem}.png")


def show(item: Item, plain: bool) -> Panel:
    """Render one item for a terminal: both answers side by side, dropped words marked as in `marked`."""
    answers = Table(box=None, expand=True, padding=(0, 1))
    answers.add_column("dense", ratio=1)
    answers.add_column("sparse", ratio=1)
    answers.add_row(
        _judged(Text(item.answer_dense), item.answer_dense, item.expected),
        _judged(marked(item.output_words, item.output_words_kept, plain), item.answer, item.expected),
    )
    return Panel(
        Group(answers, Text(item.overlay, style="dim")),
        title=f"{item.picture}: {item.question}",
        title_align="left",
    )


def table(items: Sequence[Item]) -> Table:
    """Render what was kept and saved, one row an item."""
    result = Table(title="kept and saved by the sparse context")
    result.add_column("picture", no_wrap=True)
    result.add_column("request", max_width=34)
    for heading in ("image tokens", "output tokens", "K/V cache, kB", "prefill, MFLOPs"):
        result.add_column(heading, justify="right")
    for item in items:
        result.add_row(
            Path(item.picture).stem,
            item.question,
            _share(item.image_tokens_kept, item.image_tokens),
            _share(item.output_tokens_kept, item.output_tokens),
            _share(item.kv_bytes, item.kv_bytes_dense, 1000),
            _share(item.prefill_flops, item.prefill_flops_dense, 10**6),
        )
    return result


def present(items: Iterator[Item], console: Console) -> list[Item]:
    """Print items as they come, then the legend and the table; return the items."""
    plain = console.color_system is None  # a file, a pipe, a dumb terminal
    done = []
    for item in items:
        console.print(show(item, plain))
        done.append(item)
    legend = marked(["word"], [False], plain) + Text(" = its K/V was dropped after it was said")
    console.print(legend, table(done))
    return done


def as_json(items: Sequence[Item]) -> dict[str, list[dict[str, object]]]:
    """Return the items as plain data."""
    return {"items": [asdict(item) for item in items]}


def _answer(model: PreTrainedModel, processor: ProcessorMixin, request: Request, path: Path) -> Item:
    with as_file(files("dynamic_llava") / "assets" / request.picture) as file:
        picture = open_image(file)
    with dense(model):
        without = ask(model, processor, request.question, [picture], MAX_NEW_TOKENS)
    reply = ask(model, processor, request.question, [picture], MAX_NEW_TOKENS)
    return _item(processor, picture, request, reply, without.text, path)


def _item(
    processor: ProcessorMixin,
    picture: Image.Image,
    request: Request,
    reply: Reply,
    answer_dense: str,
    path: Path,
) -> Item:
    report = reply.report
    if report is None or not report.image_scores[0]:
        raise ValueError(
            "the checkpoint keeps all image tokens, so there is nothing to show; use --model nano"
        )
    pixels_CHW = processor.image_processor(picture, return_tensors="pt")["pixel_values"][0]
    scores = report.image_scores[0][0].tolist()
    sheet = overlay(picture, as_seen(processor, pixels_CHW), report.image_kept[0].tolist(), scores)
    save_overlay(sheet, path)
    summary = report.summary()
    return Item(
        picture=request.picture,
        question=request.question,
        answer=reply.text,
        answer_dense=answer_dense,
        expected=request.expected,
        **{name: int(summary[name]) for name in COUNTS},
        overlay=str(path),
        output_words=tuple(pieces(processor, reply.token_ids)),
        output_words_kept=tuple(report.text_kept[0].tolist()),
    )


def _judged(shown: Text, answer: str, expected: str | None) -> Text:
    if expected is None:
        return shown
    is_right = answer == expected
    mark = Text("\nright" if is_right else "\nwrong", style="green" if is_right else "red")
    return Text.assemble(shown, mark)


def _share(kept: int, total: int, unit: int = 1) -> str:
    if total == 0:
        return "-"
    return f"{kept / unit:,.0f} of {total / unit:,.0f} ({kept / total:.0%})"
