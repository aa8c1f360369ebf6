"""The processor of a checkpoint in transformers' format."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import AutoProcessor, LlavaProcessor, ProcessorMixin

from dynamic_llava.checkpoints.tokenizer import check_tokenizer
from dynamic_llava.files import check_input, first_line, read_object

WITH_CLASS_TOKEN = ("clip_vision_model",)  # towers with one token more than patches


def read_processor(folder: Path, config: Any) -> ProcessorMixin:
    """Read the processor of a model with ``config``, which says what files of older transformers leave out.

    Raises
    ------
    ImportError
        If its tokenizer needs libraries that are missing.
    ValueError
        If it cannot be read.
    """
    check_tokenizer(folder)
    for path in filter(Path.is_dir, folder.glob("*.json")):
        check_input(path, "JSON file")  # transformers goes on without what it holds
    try:
        processor: ProcessorMixin = AutoProcessor.from_pretrained(folder)
    except ImportError:
        raise
    except Exception as error:  # broken files raise anything in transformers
        for path in sorted(folder.glob("*.json")):
            read_object(path)  # names the file that it was
        raise ValueError(
            f"{folder}: the processor cannot be read: {type(error).__name__}: {first_line(error)}"
        ) from error
    if not isinstance(processor, ProcessorMixin):  # transformers takes the tokenizer alone for one
        raise ValueError(
            f"{folder}: transformers finds no processor, only {type(processor).__name__}: check "
            "processor_class in processor_config.json"
        )
    if isinstance(processor, LlavaProcessor):
        _complete(processor, config)
    return processor


def _complete(processor: Any, config: Any) -> None:
    vision = config.vision_config
    if processor.patch_size is None:
        processor.patch_size = vision.patch_size
    if processor.vision_feature_select_strategy is None:
        processor.vision_feature_select_strategy = config.vision_feature_select_strategy
    if not processor.num_additional_image_tokens:  # zero where no file says it
        processor.num_additional_image_tokens = int(vision.model_type in WITH_CLASS_TOKEN)
    if processor.chat_template is None:
        processor.chat_template = processor.tokenizer.chat_template
