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

from dynamic_llava.chat import chat_answer
from dynamic_llava.evaluation.batches import Kept, encode_questions
from dynamic_llava.evaluation.tasks import Question
from dynamic_llava.sparsifier import Sparsifier


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
    continuations = [chat_answer(processor, question.text, 1, question.answer) for question in asked]
    answers = processor.tokenizer(
        continuations, add_special_tokens=False, padding=True, padding_side="right", return_tensors="pt"
    )
    prompt = encode_questions(processor, asked).to(model.device)
    given = _Given(prompt, answers["input_ids"], answers["attention_mask"].bool())
    sparsifier = cast(Sparsifier | None, getattr(model, "sparsifier", None))
    steps = sparsifier is not None and sparsifier.evicting is not None
    with torch.inference_mode():
        predicted_BAV = _step_by_step(model, given, kept) if steps else _in_one_pass(model, given, kept)
    loss_BA = F.cross_entropy(
        predicted_BAV.float().transpose(1, 2), given.answer_BA.to(model.device), reduction="none"
    ).double()
    return (loss_BA.cpu() * given.spoken_BA).sum(dim=1), given.length_B


def _in_one_pass(model: PreTrainedModel, given: _Given, kept: Kept) -> Tensor:
    """Return the logits that predict each answer token, from a masked pass over all tokens."""
    inputs, prompt_BP = given.prompt, given.prompt["attention_mask"]
    prompts = prompt_BP.shape[1]
    # The last token of an answer is never fed back, so nothing decides on it.
    fed_BA = torch.arange(given.answer_BA.shape[1]) < given.length_B[:, None] - 1
    attention_mask_BN = torch.cat([prompt_BP, given.spoken_BA.to(prompt_BP)], dim=1)
    inputs["input_ids"] = torch.cat([inputs["input_ids"], given.answer_BA.to(prompt_BP)], dim=1)
    inputs["attention_mask"] = attention_mask_BN
    inputs["position_ids"] = (attention_mask_BN.cumsum(dim=1) - 1).clamp(min=0)
    masks = {}
    if getattr(model, "sparsifier", None) is not None:
        no_BP = torch.zeros_like(prompt_BP, dtype=torch.bool)
        masks = {"answer_mask": torch.cat([no_BP, fed_BA.to(no_BP.device)], dim=1)}
    logits_BNV = model(**inputs, **masks, use_cache=False).logits
    kept.add(model, inputs, (given.length_B - 1).tolist())
    return cast(Tensor, logits_BNV[:, prompts - 1 : -1])


def _step_by_step(model: PreTrainedModel, given: _Given, kept: Kept) -> Tensor:
    """Return the same from decoding with a cache; what a row holds is counted when its answer ends."""
    mask_BN = given.prompt["attention_mask"]
    out = model(
        **given.prompt,
        position_ids=(mask_BN.cumsum(dim=1) - 1).clamp(min=0),
        use_cache=True,
        logits_to_keep=1,
    )
    kept.add(model, given.prompt, [0] * len(mask_BN))
    logits = [out.logits]
    fed_B = given.length_B - 1
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
        if ended := (fed_B == step + 1).nonzero().flatten().tolist():
            held = cast(Sparsifier, model.sparsifier).report.text_kept  # type: ignore[union-attr]
            kept.output += len(ended) * (step + 1)
            kept.output_kept += sum(int(held[row].sum()) for row in ended)
    return torch.cat(logits, dim=1)
