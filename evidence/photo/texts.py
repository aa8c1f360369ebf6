"""Writes the text-only turns of photo's training: what its language model answers before it learns to see.

    python -m evidence.photo.texts ../shared/photos/flickr8k/captions.jsonl runs/photo/texts.jsonl

Trained on its own answers, a model keeps its language while it learns something else; no data set is needed.
"""

from __future__ import annotations

import json
import random
import re
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from dynamic_llava import load
from dynamic_llava.chat.asking import encode, greedy
from dynamic_llava.chat.prompt import chat_prompt
from dynamic_llava.data.photographs import captioned
from dynamic_llava.files import replacing

NOUNS, BATCH, LONGEST = 150, 25, 64
ASKING = (
    "What is a {}?",
    "Write one sentence about a {}.",
    "Where would you find a {}?",
    "What can you do with a {}?",
)
GENERAL = (
    "Tell me a short story about a lost key.",
    "What is the capital of Italy?",
    "Explain why the sky is blue.",
    "Give me three tips for sleeping well.",
    "Write a short poem about the sea.",
    "What is 7 times 8?",
    "How do I boil an egg?",
    "Name five fruits.",
    "What is the opposite of hot?",
    "Who wrote Hamlet?",
    "Write a polite reply that declines an invitation.",
    "What is photosynthesis?",
    "Translate 'good morning' into French.",
    "Give me a list of things to pack for a hike.",
    "Why do leaves change colour in autumn?",
    "What does a compiler do?",
    "Summarise the plot of Cinderella in two sentences.",
    "What is the largest planet?",
    "How do bees make honey?",
    "Write a Python function that adds two numbers.",
    "What should I cook with rice and tomatoes?",
    "What is gravity?",
    "Rewrite this politely: Give me the report now.",
    "What is the difference between a lake and a sea?",
    "Hello, how are you?",
)


def main(captions: Path, output: Path) -> None:
    """Ask the base model and write LLaVA's layout, a conversation a line."""
    model, processor = load("photo-base", dtype=torch.bfloat16)
    prompts = [*GENERAL, *_about(captions)]
    with replacing(output) as partial, partial.open("w", encoding="utf-8") as file:
        for start in range(0, len(prompts), BATCH):
            asked = prompts[start : start + BATCH]
            for prompt, answer in zip(asked, _answers(model, processor, asked), strict=True):
                turns = [{"from": "human", "value": prompt}, {"from": "gpt", "value": answer}]
                if answer:
                    file.write(json.dumps({"id": prompt, "conversations": turns}) + "\n")


def _about(captions: Path) -> Iterator[str]:
    """Yield a question about each of the most frequent things that captions name after an article."""
    said = Counter(
        noun
        for picture in captioned(captions, "train")
        for caption in picture.captions
        for noun in re.findall(r"\b(?:a|an) ([a-z]{3,})(?=[.,]| on| in| with| at| of)", caption.lower())
    )
    draw = random.Random("texts")
    for noun, _ in said.most_common(NOUNS):
        yield draw.choice(ASKING).format(noun)


def _answers(model: Any, processor: Any, prompts: Sequence[str]) -> list[str]:
    inputs = encode(processor, [chat_prompt(processor, prompt, 0) for prompt in prompts], [])
    sequence_BN = greedy(model, inputs, LONGEST)
    return [_whole(text) for text in processor.batch_decode(sequence_BN, skip_special_tokens=True)]


def _whole(text: str) -> str:
    """Cut an answer at the end of its last whole sentence; the number of a list's item ends none."""
    ends = [match.end() for match in re.finditer(r"(?<!\d)[.!?](?=\s|$)", text)]
    return text[: ends[-1]].strip() if ends else ""


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
