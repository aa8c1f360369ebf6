"""Packed rows train on exactly what their turns are as single-turn prompts."""

from __future__ import annotations

import pytest
import torch
from transformers import LlavaProcessor

from dynamic_llava.data import scenes
from dynamic_llava.data.training import IGNORE
from dynamic_llava.training import nano
from dynamic_llava.training.nano.packing import Packer


@pytest.fixture(scope="module")
def processor() -> LlavaProcessor:
    return nano.build_processor(scene_count=50)


def _single(processor: LlavaProcessor, question: str, answer: str) -> list[int]:
    content = [{"type": "image"}, {"type": "text", "text": question}]
    messages = [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]
    text = processor.apply_chat_template(messages).replace("<image>", "<image>" * 144)
    ids: list[int] = processor.tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids


def test_each_turn_reads_as_the_chat_template_writes_it(processor: LlavaProcessor) -> None:
    sample = scenes.make(3, "train")
    batch = Packer(processor, short_answer_weight=2.0)([sample], [0])
    visible_NN = batch["attention_mask"][0, 0]
    ends = (batch["labels"][0] == processor.tokenizer.eos_token_id).nonzero().flatten().tolist()
    assert len(ends) == len(sample.turns)
    for turn, end in zip(sample.turns, ends, strict=True):
        seen = visible_NN[end].nonzero().flatten()
        assert batch["input_ids"][0, seen].tolist() == _single(processor, turn.question, turn.answer)
        assert batch["position_ids"][0, seen].tolist() == list(range(len(seen)))


def test_only_answers_are_labelled_and_only_descriptions_are_droppable(processor: LlavaProcessor) -> None:
    samples = [scenes.make(index, "train") for index in (0, 1, 2)]
    batch = Packer(processor, short_answer_weight=2.0)(samples, [0, 1, 2])
    for row, sample in enumerate(samples):
        labelled = batch["labels"][row] != IGNORE
        text = processor.tokenizer.decode(batch["labels"][row][labelled])
        assert text == "".join(f" {turn.answer}</s>" for turn in sample.turns)
        droppable = processor.tokenizer.decode(batch["input_ids"][row][batch["answer_mask"][row]])
        assert droppable == f" {sample.turns[-1].answer}</s>"


def test_packed_logits_equal_single_turn_logits(processor: LlavaProcessor) -> None:
    model = nano.build_model(processor, seed=0).eval()
    sample = scenes.make(5, "train")
    batch = Packer(processor, short_answer_weight=2.0)([sample], [0])
    with torch.no_grad():
        packed = model(
            input_ids=batch["input_ids"], pixel_values=batch["pixel_values"],
            attention_mask=batch["attention_mask"], position_ids=batch["position_ids"],
        ).logits[0]  # fmt: skip
        turn = sample.turns[2]
        single = torch.tensor([_single(processor, turn.question, turn.answer)])
        alone = model(input_ids=single, pixel_values=batch["pixel_values"]).logits[0]
    end = (batch["labels"][0] == processor.tokenizer.eos_token_id).nonzero().flatten()[2]
    seen = batch["attention_mask"][0, 0, end].nonzero().flatten()
    torch.testing.assert_close(packed[seen], alone, atol=1e-4, rtol=1e-4)
