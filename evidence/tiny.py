"""Tiny random models and inputs, for programs here and for tests: no tokenizer, no files, fast.

Of the library they use its public names alone, so that they also serve its earlier commits.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from dynamic_llava import Sparsifier, SparsityConfig

IMAGE_TOKEN, PAD, VOCABULARY = 3, 0, 64
IMAGE_TOKENS = 16


def model(
    attention: str = "sdpa", seed: int = 0, layers: int = 4, key_heads: int = 2
) -> LlavaForConditionalGeneration:
    """Return a LLaVA with 16 image tokens; weights are large enough that every layer matters."""
    torch.manual_seed(seed)
    # Names that transformers takes but does not declare.
    undeclared: dict[str, Any] = {"image_token_id": IMAGE_TOKEN, "attn_implementation": attention}
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=16,
            patch_size=4,
        ),
        text_config=LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=layers,
            num_attention_heads=4,
            num_key_value_heads=key_heads,
            max_position_embeddings=512,
            pad_token_id=PAD,
            bos_token_id=1,
            eos_token_id=2,
        ),
        image_seq_length=IMAGE_TOKENS,
        **undeclared,
    )
    made = LlavaForConditionalGeneration(config).eval()
    for parameter in made.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
    made.generation_config.eos_token_id = None
    made.generation_config.suppress_tokens = [IMAGE_TOKEN]  # without a cache it would ask for another picture
    return made


def sparsifier(seed: int = 0, **settings: Any) -> Sparsifier:
    """Return a sparsifier for :func:`model` whose decisions on output tokens are mixed."""
    torch.manual_seed(seed + 1)
    values: dict[str, Any] = {"image_keep_rate": 0.25, "d_model": 16, "nhead": 2, "dim_feedforward": 32}
    made = Sparsifier(SparsityConfig.from_dict(values | settings), hidden_size=32).eval()
    for parameter in made.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=2 * parameter.shape[-1] ** -0.5)
    return made


def row(text: int, images: int = 1, seed: int = 0) -> dict[str, torch.Tensor]:
    """Return one unpadded prompt: a token, the pictures, ``text`` tokens."""
    generator = torch.Generator().manual_seed(seed)
    words = torch.randint(4, VOCABULARY, (1 + text,), generator=generator)
    picture = torch.full((images * IMAGE_TOKENS,), IMAGE_TOKEN)
    input_ids = torch.cat([words[:1], picture, words[1:]])[None]
    inputs = {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids)}
    if images:
        inputs["pixel_values"] = torch.randn(images, 3, 16, 16, generator=generator)
    return inputs


def batch(rows: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Return rows in one batch, padded on the left."""
    length = max(r["input_ids"].shape[1] for r in rows)

    def padded(name: str) -> torch.Tensor:
        return torch.cat([torch.nn.functional.pad(r[name], (length - r[name].shape[1], 0)) for r in rows])

    inputs = {name: padded(name) for name in ("input_ids", "attention_mask")}
    pictures = [r["pixel_values"] for r in rows if "pixel_values" in r]
    return inputs | ({"pixel_values": torch.cat(pictures)} if pictures else {})
