"""Shows the numbers of an evaluation in a terminal: settings side by side, kinds of questions one a row."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich import box
from rich.table import Table

from dynamic_llava.costs.flops import FLOP_UNITS, flop_unit

Numbers = Mapping[str, Any]
SCORES = {
    "bleu_1": "BLEU-1",
    "bleu_4": "BLEU-4",
    "meteor": "METEOR",
    "rouge_l": "ROUGE-L",
    "cider": "CIDEr",
    "accuracy": "exactly right",
    "wups_0.9": "WUPS 0.9",
    "wups_0.0": "WUPS 0.0",
}


def table(numbers: Numbers) -> Table:
    """Lay out what `evaluate` returned as ``numbers`` within 80 columns."""
    if "kinds" in numbers:
        return _kinds(numbers)
    return _settings(numbers) if "dense" in numbers or "sparse" in numbers else _scores(numbers)


def _kinds(numbers: Numbers) -> Table:
    """Lay out short answers, one row for each kind of question."""
    result = _table(
        f"Kept: {numbers['image_tokens_kept']:.1%} of the image tokens, "
        f"{numbers['output_tokens_kept']:.1%} of the output tokens that were fed back."
    )
    for heading in ("right", "accuracy", "95 % interval"):
        result.add_column(heading, justify="right")
    for name, row in {"all": numbers, **numbers["kinds"]}.items():
        right = f"{row['right']:,} of {row['total']:,}"
        result.add_row(name, right, f"{row['accuracy']:.1f}%", _interval(row))
    return result


def _scores(numbers: Numbers) -> Table:
    """Lay out scores in percent, one a row."""
    result = _table(
        f"Kept: {numbers['image_tokens_kept']:.1%} of the image tokens, "
        f"{numbers['output_tokens_kept']:.1%} of the output tokens that were fed back."
    )
    result.add_column("percent", justify="right")
    for name, label in SCORES.items():
        if name in numbers:
            result.add_row(label, f"{numbers[name]:.1f}")
    return result


def _settings(numbers: Numbers) -> Table:
    """Lay out long answers, one column for each setting."""
    first = next(iter(numbers.values()))
    unit = flop_unit(1e12 * first["decode_tflops"])
    scale = 1e12 / FLOP_UNITS[unit]
    result = _table(f"{first['total']:,} answers. Costs are means over generated answers, by count.")
    for name in numbers:
        result.add_column(name.replace("+", "\n+ "), justify="right")
    rows = {
        "perplexity": lambda row: f"{row['perplexity']:.4f}",
        "METEOR": lambda row: f"{row['meteor']:.4f}",
        "exactly right": lambda row: f"{row['accuracy']:.1f}%",
        "95 % interval": _interval,
        "image tokens kept": lambda row: f"{row['image_tokens_kept']:.1%}",
        "output tokens kept": lambda row: f"{row['output_tokens_kept']:.1%}",
        "tokens an answer": lambda row: f"{row['mean_answer_tokens']:.1f}",
        "answers cut": lambda row: f"{row['cut_answers']:.4g}",
        f"decode, {unit}": lambda row: f"{scale * row['decode_tflops']:.2f}",
        "as the paper counts": lambda row: f"{scale * row['decode_tflops_paper']:.2f}",
        "K/V held, MB": lambda row: f"{row['kv_bytes'] / 1e6:,.2f}",
    }
    if "prefill_ms" in first:
        rows |= {
            "K/V allocated, MB": lambda row: f"{row['kv_bytes_allocated'] / 1e6:,.2f}",
            "prefill, ms": lambda row: f"{row['prefill_ms']:.1f}",
            "a token, ms": lambda row: f"{row['token_ms']:.1f}",
            "CIDEr of sentences": lambda row: f"{row['cider']:.1f}" if "cider" in row else "",
            "repeated": lambda row: f"{row['repetition']:.1f}%",
        }
    for label, cell in rows.items():
        result.add_row(label, *(cell(row) for row in numbers.values()))
    return result


def _table(caption: str) -> Table:
    result = Table(box=box.SIMPLE_HEAD, pad_edge=False, caption=caption, caption_justify="left")
    result.add_column(no_wrap=True)
    return result


def _interval(row: Numbers) -> str:
    """Return the interval of the share of right answers; a mean over seeds has none of its own."""
    return "{:.1f}–{:.1f}".format(*row["interval_95"]) if "interval_95" in row else ""
