"""Answers with the record of what was kept, and the stock model inside of a dense block."""

from __future__ import annotations

import pytest
import torch
from PIL import Image
from transformers import LlavaForConditionalGeneration, LlavaProcessor

from dynamic_llava.chat.asking import ask, dense, encode, report_of
from dynamic_llava.chat.prompt import chat_prompt

RED = Image.new("RGB", (96, 96), (255, 0, 0))
BLUE = Image.new("RGB", (50, 90), (0, 0, 255))
IMAGE_TOKENS = 144


def test_batch_has_one_begin_mark_a_row_and_left_padding(processor: LlavaProcessor) -> None:
    prompts = [chat_prompt(processor, prompt, 1) for prompt in ("is it red?", "what color is the shape?")]
    inputs = encode(processor, prompts, [RED, BLUE])
    tokens_BN, mask_BN = inputs["input_ids"], inputs["attention_mask"]
    assert inputs["pixel_values"].shape == (2, 3, 96, 96)
    assert mask_BN[:, -1].tolist() == [1, 1]
    assert mask_BN[0, 0] == 0
    begin = processor.tokenizer.bos_token_id
    assert (tokens_BN == begin).sum(dim=1).tolist() == [1, 1]
    assert (tokens_BN == processor.image_token_id).sum(dim=1).tolist() == [IMAGE_TOKENS] * 2


def test_ask_reports_what_was_kept(model: LlavaForConditionalGeneration, processor: LlavaProcessor) -> None:
    reply = ask(model, processor, "describe it", [RED], max_new_tokens=12)
    assert len(reply.token_ids) == 12
    assert reply.text == processor.decode(reply.token_ids, skip_special_tokens=True).strip()
    assert reply.report is not None
    summary = reply.report.summary()
    assert summary["image_tokens"] == IMAGE_TOKENS
    assert summary["image_tokens_kept"] == int(0.2 * IMAGE_TOKENS)
    assert summary["output_tokens"] == 11  # the last token is never fed back
    assert summary["output_tokens_kept"] == int(reply.report.text_kept[0].sum())
    assert summary["kv_bytes"] < summary["kv_bytes_dense"]


def test_two_pictures(model: LlavaForConditionalGeneration, processor: LlavaProcessor) -> None:
    reply = ask(model, processor, "<image> or <image> ?", [RED, BLUE], max_new_tokens=3)
    assert reply.report is not None
    assert reply.report.summary()["image_tokens"] == 2 * IMAGE_TOKENS


def test_dense_block_is_the_stock_model(
    model: LlavaForConditionalGeneration, processor: LlavaProcessor
) -> None:
    sparsifier = model.sparsifier
    inputs = encode(processor, [chat_prompt(processor, "is it red?", 1)], [RED])
    with torch.inference_mode():
        sparse = model(**inputs).logits[:, -1]
        with dense(model):
            assert report_of(model) is None
            stock = model(**inputs).logits[:, -1]
        assert model.sparsifier is sparsifier
        assert torch.equal(model(**inputs).logits[:, -1], sparse)
        sparsifier.detach()
        assert torch.equal(model(**inputs).logits[:, -1], stock)
    assert not torch.allclose(sparse, stock)


def test_dense_block_attaches_again_after_an_error(model: LlavaForConditionalGeneration) -> None:
    with pytest.raises(RuntimeError, match="stop"), dense(model):
        raise RuntimeError("stop")
    assert model.sparsifier.report is None
