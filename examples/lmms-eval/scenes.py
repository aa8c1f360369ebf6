"""Writes the data of the local task: python examples/lmms-eval/scenes.py FOLDER [COUNT]."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from PIL import Image

from dynamic_llava.data import scenes


def write(folder: Path, count: int) -> Path:
    """Draw ``count`` held-out scenes and write their short questions, one a line; return the file."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "questions.jsonl"
    lines = []
    for number in range(count):
        sample = scenes.make(number, "heldout")
        picture = folder / f"{number}.png"
        sample.open_image().save(picture)
        for turn in sample.turns:
            if turn.kind != "description":
                line = {"picture": str(picture.resolve()), "question": turn.question, "answer": turn.answer}
                lines.append(json.dumps(line))
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def doc_to_visual(doc: dict[str, Any]) -> list[Image.Image]:
    """Open the picture of a question."""
    with Image.open(doc["picture"]) as image:
        return [image.convert("RGB")]


def doc_to_text(doc: dict[str, Any], settings: Any = None) -> str:
    """Return the question."""
    return str(doc["question"])


def process_results(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """Compare an answer with its reference."""
    return {"accuracy": float(results[0].strip().casefold() == doc["answer"].strip().casefold())}


if __name__ == "__main__":
    print(write(Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 20))
