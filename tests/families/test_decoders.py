"""LLaVA around other decoders: sparse answers are those of the stock model with dropped columns closed."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from tests import tiny
from tests.families import reference
from transformers import AutoConfig, LlavaConfig, LlavaForConditionalGeneration

from dynamic_llava import Sparsifier, SparsityConfig

STEPS, SPLIT = 12, 2
DECODERS: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": 8},
    "qwen2": {
        "use_sliding_window": True,
        "sliding_window": 8,
        "layer_types": ["full_attention", "sliding_attention", "sliding_attention", "full_attention"],
    },
    "qwen3": {"head_dim": 8},
    "granite": {"embedding_multiplier": 3.0, "residual_multiplier": 0.5, "logits_scaling": 2.0},
    "phi3": {"pad_token_id": 0},
    "cohere": {},
    "olmo2": {},
}


def build(decoder: str, attention: str) -> Any:
    torch.manual_seed(0)
    vision = tiny.model().config.vision_config
    sizes = {"vocab_size": tiny.VOCABULARY, "hidden_size": 32, "intermediate_size": 64}
    heads = {"num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2}
    tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    text = AutoConfig.for_model(
        decoder, **sizes, **heads, max_position_embeddings=256, **tokens | DECODERS[decoder]
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_id=tiny.IMAGE_TOKEN,
        image_seq_length=tiny.IMAGE_TOKENS,
        attn_implementation=attention,
    )
    model = LlavaForConditionalGeneration(config).eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
    model.generation_config.eos_token_id = None
    model.generation_config.suppress_tokens = [tiny.IMAGE_TOKEN]
    return model


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("decoder", DECODERS)
def test_sparse_answers_are_those_of_closed_columns(decoder: str, attention: str, use_cache: bool) -> None:
    model = build(decoder, attention)
    stock = copy.deepcopy(model)
    stock.set_attn_implementation("eager")
    sizes = {"d_model": 16, "nhead": 2, "dim_feedforward": 32, "layer": SPLIT}
    config = SparsityConfig(image_policy="random", text_policy="random", image_keep_rate=0.25, **sizes)
    sparsifier = Sparsifier(config, 32).attach(model)
    rows = [tiny.row(3, 1, 0), tiny.row(9, 2, 1), tiny.row(5, 0, 2)]
    out = model.generate(
        **tiny.batch(rows),
        max_new_tokens=STEPS,
        do_sample=False,
        use_cache=use_cache,
        output_logits=True,
        return_dict_in_generate=True,
    )
    found = torch.stack(out.logits, dim=1)
    report = sparsifier.report
    for number, row in enumerate(rows):
        prompt = row["input_ids"].shape[1]
        ids = torch.cat([row["input_ids"], out.sequences[number : number + 1, -STEPS:-1]], dim=1)
        inputs = row | {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        keep = torch.ones(ids.shape[1], dtype=torch.bool)
        places = (row["input_ids"][0] == tiny.IMAGE_TOKEN).nonzero()[:, 0]
        keep[places] = False
        keep[places[report.image_kept[number]]] = True
        keep[prompt:] = report.text_kept[number]
        assert 0 < int(keep[prompt:].sum()) < STEPS - 1
        expected = reference.logits(stock, stock.model.language_model, SPLIT, inputs, keep)
        torch.testing.assert_close(found[number], expected[prompt - 1 :], atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("decoder", DECODERS)
def test_keep_rate_one_is_the_stock_model(decoder: str) -> None:
    model, inputs = build(decoder, "sdpa"), tiny.batch([tiny.row(3, 1, 0), tiny.row(9, 2, 1)])
    expected = model.generate(**inputs, max_new_tokens=STEPS, do_sample=False)
    config = SparsityConfig(image_policy="uniform", image_keep_rate=1.0, sparsify_text=False)
    Sparsifier(config, 32).attach(model)
    assert torch.equal(model.generate(**inputs, max_new_tokens=STEPS, do_sample=False), expected)
