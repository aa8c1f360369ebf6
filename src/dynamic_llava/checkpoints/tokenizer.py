"""Whether a checkpoint folder has a tokenizer, and whether it can be read here."""

from __future__ import annotations

from pathlib import Path

from transformers.utils.import_utils import is_protobuf_available, is_sentencepiece_available

from dynamic_llava.files import first_line

FAST, SENTENCEPIECE = "tokenizer.json", "tokenizer.model"


def has_tokenizer(folder: Path) -> bool:
    """Tell whether a checkpoint folder has a tokenizer."""
    return any((folder / name).is_file() for name in (FAST, SENTENCEPIECE))


def check_tokenizer(folder: Path) -> None:
    """Refuse what transformers would advise wrongly on: ``tokenizer.model`` alone that cannot be read.

    Raises
    ------
    ImportError
        If the libraries that read it are missing.
    ValueError
        If it is broken.
    """
    path = folder / SENTENCEPIECE
    if (folder / FAST).is_file() or not path.is_file():
        return
    if not (is_sentencepiece_available() and is_protobuf_available()):
        raise ImportError(f"{path} needs sentencepiece and protobuf: pip install 'dynamic-llava[official]'")
    from sentencepiece import SentencePieceProcessor

    try:
        SentencePieceProcessor(model_file=str(path))
    except (RuntimeError, OSError) as error:
        raise ValueError(f"{path} is no model of sentencepiece: {first_line(error)}") from error
