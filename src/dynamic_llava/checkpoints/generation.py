"""Whether a checkpoint's own settings of generation can be used."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import GenerationConfig

from dynamic_llava.checkpoints.configs import made_from
from dynamic_llava.files import check_input, read_object

FILE = "generation_config.json"
TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id", "forced_bos_token_id", "forced_eos_token_id")
NUMBERS = (
    "max_length", "max_new_tokens", "min_length", "min_new_tokens", "max_time", "num_beams", "temperature",
    "top_k", "top_p", "min_p", "typical_p", "repetition_penalty", "length_penalty", "no_repeat_ngram_size",
    "penalty_alpha", "guidance_scale", "num_return_sequences",
)  # fmt: skip


def check_generation(folder: Path, text_config: Any) -> None:
    """Refuse settings that generation fails on, or that end no answer; transformers finds out in the middle.

    Parameters
    ----------
    folder
        Of the checkpoint; where it holds no ``generation_config.json``, its config's end tokens count.
    text_config
        Config of the decoder.

    Raises
    ------
    ValueError
        If the file is broken, or one of its settings is no number or no token of the vocabulary.
    """
    path = folder / FILE
    if not path.exists():
        named = {name: getattr(text_config, name, None) for name in TOKENS}
        _check_tokens(folder / "config.json", named, text_config.vocab_size)
        return
    check_input(path, "generation config")
    settings = read_object(path)
    _check_tokens(path, settings, text_config.vocab_size)
    for name in NUMBERS:
        value = settings.get(name)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int | float)):
            raise ValueError(f"{path}: {name} is {value!r}: it must be a number, or null")
    with made_from(path, "generation"):
        GenerationConfig.from_dict(dict(settings))


def _check_tokens(path: Path, settings: Mapping[str, Any], vocabulary: int) -> None:
    for name in TOKENS:
        given = settings.get(name)
        may_be_list = name.endswith("eos_token_id")
        tokens = given if isinstance(given, list) and may_be_list else [given]
        for token in tokens:
            # -1 stands for no padding in old configs, but answers that it should end would never end.
            lowest = 0 if may_be_list else -1
            is_id = isinstance(token, int) and not isinstance(token, bool) and lowest <= token < vocabulary
            if token is not None and not is_id:
                raise ValueError(
                    f"{path}: {name} is {given!r}: it must be null, or a token id from {lowest} to "
                    f"{vocabulary - 1}"
                )
