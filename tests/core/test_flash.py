"""flash_attention_2: transformers' own path to it, with its kernels computed in plain torch."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

import pytest
import torch
from tests import tiny
from torch import Tensor
from transformers import modeling_flash_attention_utils as stock
from transformers.utils import import_utils

from dynamic_llava import methods

CLOSE = {"atol": 1e-5, "rtol": 1e-4}
STEPS = 16


def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    deterministic: bool = False,
) -> Tensor:
    """Rows of one length, ``[B, N, H, D]``; the last query sees the last key."""
    repeats = q.shape[2] // k.shape[2]
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    k, v = k.repeat_interleave(repeats, 1), v.repeat_interleave(repeats, 1)
    scores = q @ k.mT * softmax_scale
    if causal:
        sees = torch.ones(scores.shape[-2:], dtype=torch.bool).tril(k.shape[2] - q.shape[2])
        scores = scores.masked_fill(~sees, -torch.inf)
    return (scores.softmax(-1) @ v).transpose(1, 2)


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    deterministic: bool = False,
) -> Tensor:
    """Rows of different lengths, one after the other, ``[sum of N, H, D]``."""
    rows_q, rows_k = (bounds.diff().tolist() for bounds in (cu_seqlens_q, cu_seqlens_k))
    rows = zip(q.split(rows_q), k.split(rows_k), v.split(rows_k), strict=True)
    scale = softmax_scale
    return torch.cat(
        [flash_attn_func(*(x[None] for x in row), softmax_scale=scale, causal=causal)[0] for row in rows]
    )


@pytest.fixture(autouse=True)
def kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    package, padding = ModuleType("flash_attn"), ModuleType("flash_attn.bert_padding")
    vars(package).update(
        flash_attn_func=flash_attn_func,
        flash_attn_varlen_func=flash_attn_varlen_func,
        flash_attn_with_kvcache=None,
        bert_padding=padding,
    )
    vars(padding).update(pad_input=stock._pad_input, unpad_input=stock._unpad_input)
    monkeypatch.setitem(sys.modules, "flash_attn", package)
    monkeypatch.setitem(sys.modules, "flash_attn.bert_padding", padding)
    monkeypatch.setattr(stock, "is_flash_attn_2_available", lambda *_, **__: True)
    monkeypatch.setattr(import_utils, "is_flash_attn_2_available", lambda *_, **__: True)
    for name, value in list(vars(stock).items()):  # what is loaded once and for all
        if name.startswith(("_flash_", "_pad_fn", "_unpad_fn", "_process_", "_loaded_")) and (
            value is None or not callable(value)
        ):
            monkeypatch.setattr(stock, name, value)


def pair(**settings: Any) -> tuple[Any, Any]:
    """The same model and sparsifier with sdpa and with flash attention."""
    models = []
    for implementation in ("sdpa", "flash_attention_2"):
        model = tiny.model()
        model.model.language_model.config._attn_implementation = implementation
        tiny.sparsifier(**settings).attach(model)
        models.append(model)
    return models[0], models[1]


INPUTS = {
    "one row": tiny.row(9, 1, 3),
    "ragged": tiny.batch([tiny.row(3, 1, 0), tiny.row(12, 2, 1), tiny.row(7, 0, 2)]),
}


def generate(model: Any, inputs: dict[str, Tensor], **options: Any) -> Tensor:
    return model.generate(**inputs, max_new_tokens=STEPS, do_sample=False, **options)


def test_the_kernels_are_those_here() -> None:
    """Nothing sparse: the stand-in gives what sdpa gives."""
    models = [tiny.model(), tiny.model()]
    models[1].model.language_model.config._attn_implementation = "flash_attention_2"
    for inputs in INPUTS.values():
        assert torch.equal(*(generate(model, inputs) for model in models))


@pytest.mark.parametrize("inputs", INPUTS.values(), ids=INPUTS)
@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("policy", [*methods.names("image"), "h2o"])
def test_flash_answers_as_sdpa(policy: str, use_cache: bool, inputs: dict[str, Tensor]) -> None:
    if policy == "h2o" and not use_cache:
        pytest.skip("h2o needs a cache")
    names = {"image_policy": "learned", "text_policy": "h2o"} if policy == "h2o" else tiny.policies(policy)
    plain, flash = pair(**names)
    assert torch.equal(
        generate(flash, inputs, use_cache=use_cache), generate(plain, inputs, use_cache=use_cache)
    )
    kept = [model.sparsifier.report.text_kept for model in (plain, flash)]
    assert all(map(torch.equal, *kept))
    assert torch.equal(*(model.sparsifier.report.kv_lengths for model in (plain, flash)))


@pytest.mark.parametrize("inputs", INPUTS.values(), ids=INPUTS)
@torch.no_grad()
def test_a_second_turn_with_a_picture(inputs: dict[str, Tensor]) -> None:
    batch = len(inputs["input_ids"])
    turn = tiny.batch([tiny.row(5, row % 2, 7 + row) for row in range(batch)])
    logits = []
    for model in pair():
        out = model.generate(**inputs, max_new_tokens=STEPS, do_sample=False, return_dict_in_generate=True)
        fed = torch.ones_like(out.sequences[:, inputs["input_ids"].shape[1] : -1])
        mask = torch.cat([inputs["attention_mask"], fed, turn["attention_mask"]], dim=1)
        positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, -turn["input_ids"].shape[1] :]
        given = turn | {"attention_mask": mask, "position_ids": positions}
        logits.append(model(**given, past_key_values=out.past_key_values).logits[:, -1])
    torch.testing.assert_close(logits[1], logits[0], **CLOSE)


@pytest.mark.parametrize("training", [True, False])
def test_one_pass_at_full_length(training: bool) -> None:
    inputs = tiny.batch([tiny.row(14, 1, 0), tiny.row(20, 2, 1)])
    answer_mask = torch.zeros_like(inputs["input_ids"], dtype=torch.bool)
    answer_mask[:, -10:] = True
    results = []
    for model in pair(min_answer_length=1):
        model.train(training)
        torch.manual_seed(0)
        out = model(**inputs, labels=inputs["input_ids"], answer_mask=answer_mask)
        real = inputs["attention_mask"].bool()
        out.loss.backward()
        grads = [p.grad for p in model.parameters() if p.grad is not None]
        results.append([out.logits[real], *grads])
    assert len(results[0]) == len(results[1]) > 40
    for plain, flash in zip(*results, strict=True):
        torch.testing.assert_close(flash, plain, atol=1e-4, rtol=1e-3)


def test_sliding_windows_and_static_caches_are_refused() -> None:
    _, flash = pair()
    with pytest.raises(ValueError, match="static cache does not work with flash_attention_2"):
        generate(flash, INPUTS["one row"], past_key_values=flash.sparsifier.new_cache(60, static=True))
    flash.sparsifier.detach()
    config = flash.model.language_model.config
    config.layer_types = ["full_attention", "full_attention", "full_attention", "sliding_attention"]
    with pytest.raises(ValueError, match="sliding window"):
        tiny.sparsifier().attach(flash)
