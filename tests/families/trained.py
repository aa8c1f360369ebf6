"""A tiny model and its real processor for each family, as one checkpoint to train from."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import Any

import pytest
from evidence.tiny_processors import KINDS
from tests.families.models import CASES
from transformers import PreTrainedModel, ProcessorMixin

from dynamic_llava import checkpoints
from dynamic_llava.files import first_line
from evidence import tiny_processors

# What configs call their special tokens, by the words that processors have for them.
IDS = {
    "image_token_id": ("<image>", "<|image_pad|>", "<IMG_CONTEXT>", "[IMG]", "<image_soft_token>"),
    "video_token_id": ("<video>", "<|video_pad|>"),
    "vision_start_token_id": ("<|vision_start|>",),
    "vision_end_token_id": ("<|vision_end|>",),
}
CASE_OF = {"pixtral": "pixtral"}


def processor(kind: str) -> ProcessorMixin:
    """Return the processor of a kind; skip the test where a package that it needs is not there."""
    try:
        return tiny_processors.processor(kind)
    except ImportError as error:
        pytest.skip(first_line(str(error).strip()))


@functools.cache
def model(kind: str) -> PreTrainedModel:
    """Return a model with random weights that takes what the processor makes."""
    case = CASES[CASE_OF.get(kind, KINDS[kind].model_type)]
    tokenizer: Any = processor(kind).tokenizer
    known = tokenizer.get_vocab()
    ids = {name: next(known[word] for word in words if word in known) for name, words in IDS.items()
           if any(word in known for word in words)}  # fmt: skip
    config = {**case.config, **{name: ids[name] for name in ids if name in case.config}}
    if "image_token_index" in config:
        config["image_token_index"] = ids["image_token_id"]
    if "video_token_index" in config:
        config["video_token_index"] = ids["video_token_id"]
    marks = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id}
    config["text_config"] = {**config["text_config"], "vocab_size": len(tokenizer), **marks}
    made: PreTrainedModel = dataclasses.replace(case, config=config).model()
    made.generation_config.suppress_tokens = None
    made.generation_config.eos_token_id = tokenizer.eos_token_id
    return made


def checkpoint(kind: str, folder: Path) -> Path:
    """Write both."""
    checkpoints.save(model(kind), processor(kind), folder)
    return folder
