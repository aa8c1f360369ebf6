"""One side of evidence.remeasure: answers prompts with the library of its process, by its public names alone.

python -m evidence.answering PROMPTS
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from evidence.revisions import serve

import dynamic_llava


class Answering:
    """Answers with this process's library, by its public names alone."""

    def __init__(self, prompts: Path) -> None:
        self._batches: list[dict[str, Any]] = torch.load(prompts)
        self._model: Any = dynamic_llava.load_model("nano", torch.float32)

    def __call__(self, line: str) -> list[dict[str, Any]]:
        """Answer ``BATCH IMAGE_POLICY RATE OUTPUT_POLICY RATE LONGEST``; return what came out of each row."""
        number, image, image_rate, text, text_rate, longest = line.split()
        config = self._model.sparsifier.config
        config.image_policy, config.text_policy = image, text
        config.image_keep_rate, config.text_keep_rate = float(image_rate), float(text_rate)
        inputs = self._batches[int(number)]
        tokens = self._model.generate(**inputs, max_new_tokens=int(longest), do_sample=False)
        report = self._model.sparsifier.report
        return [
            {"tokens": answer.tolist(), "image_kept": image_kept.tolist(), "text_kept": text_kept.tolist()}
            for answer, image_kept, text_kept in zip(tokens, report.image_kept, report.text_kept, strict=True)
        ]


if __name__ == "__main__":
    serve(Answering(Path(sys.argv[1])))
