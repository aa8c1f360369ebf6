"""Teacher forcing: how likely a model finds reference answers, as if it decoded them token by token.

Shape suffixes: B batch, N tokens, P prompt tokens, A tokens of the longest answer, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel, ProcessorMixin

from dynamic_llava.chat.asking import report_of
from dynamic_llava.chat.prompt import chat_answer
from dynamic_llava.core.report import Report
from dynamic_llava.evaluation.batches import Kept, check_rows, encode_questions
from dynamic_llava.evaluation.tasks import Question
from dynamic_llava.sparsifier import sparsifier_of


@dataclass(frozen=True)
class _Given:
    """A batch: encoded prompts, padded on the left, and their answers with end mark, padded on the right."""

    prompt: Any
    answer_BA: Tensor
    spoken_BA: Tensor

    @property
    def length_B(self) -> Tensor:
        return self.spoken_BA.sum(dim=1)


def score(
    model: PreTrainedModel, processor: ProcessorMixin, asked: Sequence[Question], kept: Kept
) -> tuple[Tensor, Tensor]:
    """Score one batch of reference answers and count in ``kept`` what stayed.

    One pass with masks does it, but for policies that give up earlier tokens: those decode step by step.

    Returns
    -------
    (Tensor, Tensor)
        Summed negative log-likelihood, float64 [B], and the number of answer tokens with end mark, int64 [B].
    """
    continuations = [
        chat_answer(processor, question.text, 1, question.answer, question.earlier) for question in asked
    ]
    answers = processor.tokenizer(
        continuations,
        add_special_tokens=False,
        padding=True,
        padding_side="right",
        return_tensors="pt",
        verbose=False,
    )
    prompt = encode_questions(processor, asked).to(model.device)
    given = _Given(prompt, answers["input_ids"], answers["attention_mask"].bool())
    check_rows(model, asked, prompt, given.length_B.tolist())
    sparsifier = sparsifier_of(model)
    steps = sparsifier is not None and sparsifier.evicting is not None
    with torch.inference_mode():
        predicted_BAV = _step_by_step(model, given, kept) if steps else _in_one_pass(model, given, kept)
    loss_BA = F.cross_entropy(
        predicted_BAV.float().transpose(1, 2), given.answer_BA.to(model.device), reduction="none"
    ).double()
    return (loss_BA.cpu() * given.spoken_BA).sum(dim=1), given.length_B


def _in_one_pass(model: PreTrainedModel, given: _Given, kept: Kept) -> Tensor:
    """Return the logits that predict each answer token, from a masked pass over all tokens."""
    prompt_BP, answers = given.prompt["attention_mask"], given.answer_BA.shape[1]
    # The last token of an answer is never fed back, so nothing decides on it.
    fed_BA = torch.arange(answers) < given.length_B[:, None] - 1
    attention_mask_BN = torch.cat([prompt_BP, given.spoken_BA.to(prompt_BP)], dim=1)
    inputs = {
        **given.prompt,
        "input_ids": torch.cat([given.prompt["input_ids"], given.answer_BA.to(prompt_BP)], dim=1),
        "attention_mask": attention_mask_BN,
        "position_ids": (attention_mask_BN.cumsum(dim=1) - 1).clamp(min=0),
    }
    if sparsifier_of(model) is not None:
        no_BP = torch.zeros_like(prompt_BP, dtype=torch.bool)
        inputs["answer_mask"] = torch.cat([no_BP, fed_BA.to(no_BP.device)], dim=1)
    # Logits of the answer alone: those of the image tokens would take more memory than all else.
    logits_BNV = model(**inputs, use_cache=False, logits_to_keep=answers + 1).logits
    kept.add(model, given.prompt, (given.length_B - 1).tolist())
    return cast(Tensor, logits_BNV[:, :-1])


def _step_by_step(model: PreTrainedModel, given: _Given, kept: Kept) -> Tensor:
    """Return the same from decoding with a cache; what a row holds is counted when its answer ends."""
    mask_BN = given.prompt["attention_mask"]
    out = model(
        **given.prompt,
        position_ids=(mask_BN.cumsum(dim=1) - 1).clamp(min=0),
        use_cache=True,
        logits_to_keep=1,
    )
    logits = [out.logits]
    fed_B = (given.length_B - 1).tolist()
    held_B = [torch.zeros(0, dtype=torch.bool)] * len(fed_B)
    for step in range(given.answer_BA.shape[1] - 1):
        mask_BN = torch.cat([mask_BN, torch.ones_like(mask_BN[:, :1])], dim=1)
        out = model(
            input_ids=given.answer_BA[:, step : step + 1].to(mask_BN),
            attention_mask=mask_BN,
            position_ids=mask_BN.sum(dim=1, keepdim=True) - 1,
            past_key_values=out.past_key_values,
            use_cache=True,
        )
        logits.append(out.logits)
        if step + 1 in fed_B:
            held_now_B = cast(Report, report_of(model)).text_kept
            held_B = [held_now_B[row] if fed == step + 1 else held_B[row] for row, fed in enumerate(fed_B)]
    kept.add(model, given.prompt, fed_B, held_B)
    return torch.cat(logits, dim=1)
