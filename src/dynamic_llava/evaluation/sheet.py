"""A contact sheet: some pictures of a task with the patches that were kept, answered dense and sparse.

One HTML file holds everything, pictures included: what may be done with them is what their owners allow.
"""

from __future__ import annotations

import base64
import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from html import escape
from io import BytesIO
from pathlib import Path

from PIL import Image
from transformers import PreTrainedModel, ProcessorMixin

from dynamic_llava.chat.asking import Reply, dense, greedy, report_of
from dynamic_llava.chat.view import as_seen, kept_panel, pieces, runs
from dynamic_llava.evaluation.batches import check_rows, encode_questions
from dynamic_llava.evaluation.tasks import Question
from dynamic_llava.files import replacing
from dynamic_llava.sparsifier import sparsifier_of

PICTURES = 24
STYLE = """\
:root { --paper: #fdfcfa; --ink: #1d1b18; --quiet: #6b665e; --line: #d8d3ca; --card: #fff; }
@media (prefers-color-scheme: dark) {
  :root { --paper: #161514; --ink: #ece8e1; --quiet: #9c958a; --line: #3a3733; --card: #1f1d1b; }
}
body { margin: 0 auto; max-width: 90rem; padding: 1rem; background: var(--paper); color: var(--ink);
  font: 1rem/1.45 system-ui, sans-serif; }
h1 { margin: 0; font-size: 1.4rem; }
.quiet, dt { color: var(--quiet); font-size: .85rem; }
main { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fill, minmax(min(100%, 26rem), 1fr)); }
article { padding: .75rem; border: 1px solid var(--line); border-radius: .6rem; background: var(--card); }
.pictures { display: flex; gap: .5rem; }
.pictures img { width: calc(50% - .25rem); border-radius: .3rem; }
h2 { margin: .5rem 0; font-size: 1rem; }
.answers { display: grid; grid-template-columns: 1fr 1fr; gap: .5rem; }
dl, dd { margin: 0; overflow-wrap: anywhere; }
s { color: var(--quiet); }
"""


@dataclass(frozen=True)
class Entry:
    """One question with both answers; ``kept`` shows the picture with the dropped patches dimmed.

    ``sparse`` has runs of words and whether their K/V was dropped; ``counts`` says what was kept.
    """

    question: Question
    seen: Image.Image
    kept: Image.Image
    dense: str
    sparse: list[tuple[bool, str]]
    counts: str


def chosen(questions: Sequence[Question], count: int = PICTURES) -> list[Question]:
    """Return questions about ``count`` pictures, drawn by chance, the same ones at each call; one of each."""
    first: dict[str, Question] = {}
    for question in questions:
        first.setdefault(question.name, question)
    return random.Random("contact sheet").sample(list(first.values()), min(count, len(first)))


def write(
    path: Path,
    model: PreTrainedModel,
    processor: ProcessorMixin,
    questions: Sequence[Question],
    max_new_tokens: int,
    title: str,
) -> None:
    """Answer some questions dense and sparse, one by one, and write the sheet.

    Parameters
    ----------
    path
        HTML file.
    model, processor
        What `dynamic_llava.load` returns, with a sparsifier.
    questions
        Of a task; `chosen` takes some.
    max_new_tokens
        Longest answer.
    title
        What the sheet shows.

    Raises
    ------
    ValueError
        The model has no sparsifier, or its image tokens form no square grid.
    """
    check(model)
    html = page(title, entries(model, processor, chosen(questions), max_new_tokens))
    with replacing(path) as partial:
        partial.write_text(html, encoding="utf-8")


def check(model: PreTrainedModel) -> None:
    """Raise ``ValueError`` if there is nothing to show."""
    if sparsifier_of(model) is None:
        raise ValueError("a contact sheet shows dense and sparse answers, and the model answers dense alone")


def entries(
    model: PreTrainedModel, processor: ProcessorMixin, questions: Sequence[Question], max_new_tokens: int
) -> Iterator[Entry]:
    """Answer each question dense and sparse."""
    for question in questions:
        with dense(model):
            without = _reply(model, processor, question, max_new_tokens)
        yield _entry(processor, question, _reply(model, processor, question, max_new_tokens), without.text)


def page(title: str, shown: Iterable[Entry]) -> str:
    """Return the sheet as one HTML document."""
    articles = "\n".join(map(_article, shown))
    return f"""<!doctype html>
<html lang="en">
<meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>{escape(title)}</title>
<style>
{STYLE}</style>
<header>
<h1>{escape(title)}</h1>
<p class="quiet">Pictures drawn by chance. Beside each: the patches that were kept; the others are dimmed.
Words <s>like these</s> were said, and their keys and values dropped afterwards.</p>
</header>
<main>
{articles}
</main>
</html>
"""


def _reply(
    model: PreTrainedModel, processor: ProcessorMixin, question: Question, max_new_tokens: int
) -> Reply:
    inputs = encode_questions(processor, [question]).to(model.device)
    check_rows(model, [question], inputs, [max_new_tokens])
    token_ids = greedy(model, inputs, max_new_tokens)[0].tolist()
    text = processor.decode(token_ids, skip_special_tokens=True).strip()
    return Reply(text, token_ids, report_of(model))


def _entry(processor: ProcessorMixin, question: Question, reply: Reply, answer_dense: str) -> Entry:
    report = reply.report
    assert report is not None  # `check` has seen the sparsifier
    pixels_CHW = processor.image_processor(question.open_image(), return_tensors="pt")["pixel_values"][0]
    seen = as_seen(processor, pixels_CHW)
    summary = report.summary()
    return Entry(
        question=question,
        seen=seen,
        kept=kept_panel(seen, report.image_kept[0].tolist(), int(summary["image_tokens"])),
        dense=answer_dense,
        sparse=runs(pieces(processor, reply.token_ids), report.text_kept[0].tolist()),
        counts=f"kept {summary['image_tokens_kept']:.0f} of {summary['image_tokens']:.0f} image tokens, "
        f"{summary['output_tokens_kept']:.0f} of {summary['output_tokens']:.0f} output tokens, "
        f"{summary['kv_bytes'] / summary['kv_bytes_dense']:.0%} of the K/V bytes",
    )


def _article(entry: Entry) -> str:
    question = entry.question
    name, text, answer = (escape(part) for part in (question.picture, question.text, question.answer))
    sparse = "".join(
        f"<s>{escape(words)}</s>" if dropped else escape(words) for dropped, words in entry.sparse
    )
    return f"""<article>
<div class="pictures">
<img src="{_address(entry.seen)}" alt="{name or "the picture"}">
<img src="{_address(entry.kept)}" alt="the same, dropped patches dimmed">
</div>
<h2>{text}</h2>
<div class="answers">
<dl><dt>dense</dt><dd>{escape(entry.dense)}</dd></dl>
<dl><dt>sparse</dt><dd>{sparse.strip()}</dd></dl>
</div>
<p class="quiet">{entry.counts}</p>
<dl><dt>reference</dt><dd class="quiet">{answer}</dd></dl>
<p class="quiet">{name}</p>
</article>"""


def _address(picture: Image.Image) -> str:
    """Return a picture as the text of an address."""
    buffer = BytesIO()
    picture.save(buffer, format="JPEG", quality=85)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")
