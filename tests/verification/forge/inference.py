"""Arrays of the kinds a, c and f: one row of :class:`~tests.verification.forge.reference.Reference` each."""

from __future__ import annotations

import numpy as np
import torch
from tests.verification.forge.model import Shape
from tests.verification.forge.reference import MARKER, Reference, Row
from torch import Tensor

STEPS = 12


def prompt(shape: Shape, seed: int, length: int = 14) -> tuple[list[int], Tensor, np.random.Generator]:
    """A random prompt with a placeholder, with the marker where the vocabulary has it, and a picture."""
    generator = np.random.default_rng([shape.seed, seed])
    ids = generator.integers(5, min(shape.vocabulary, 300), length).tolist()
    ids[4] = -200
    if shape.vocabulary > max(MARKER):
        ids[7:9] = MARKER
    pixels = generator.standard_normal((3, shape.image_size, shape.image_size), dtype=np.float32)
    return ids, torch.from_numpy(pixels), generator


def _cache(row: Row, split: int) -> dict[str, Tensor]:
    every_N = torch.ones_like(row.keep_N)
    arrays = {}
    for i in sorted({0, split - 1, split, len(row.keys) - 1}):
        held_N = every_N if i < split else row.keep_N
        arrays[f"k_layer{i}"] = row.keys[i][None, :, held_N]
        arrays[f"v_layer{i}"] = row.values[i][None, :, held_N]
    lengths = [int((every_N if i < split else row.keep_N).sum()) for i in range(len(row.keys))]
    return arrays | {"kv_len_per_layer": torch.tensor(lengths)}


def prefill(model: Reference, shape: Shape) -> dict[str, Tensor]:
    ids, pixels, _ = prompt(shape, 1)
    row = model.run(ids, pixels, [])
    remain_N, image, question = ~row.vanished_N, row.image, row.question
    length, scores = len(remain_N), row.image_logits_I2.log_softmax(-1)[:, 0]
    best, kept = scores.sort(descending=True).values, len(row.image_kept)
    spans = [[0, image.start], [image.start, image.stop], [image.stop, length], [length, length]]
    arrays = {
        "input_ids": torch.tensor([ids]),
        "pixel_values": pixels[None],
        "image_features": row.embeds_NC[None, image.start : image.stop],
        "inputs_embeds": row.embeds_NC[None],
        "embeds_indices": torch.tensor([[*spans, [question.start, length]]]),
        "logits": row.logits_NV[None, remain_N],
        "last_hidden_state": row.last_hidden_NC[None, remain_N],
        "position_ids_before": torch.arange(length)[None],
        "position_ids_after": remain_N.nonzero()[None, :, 0],
        "hidden_after_prune_in": row.entering_NC[None, remain_N],
        "hidden_image_before_prune": row.entering_NC[None, image.start : image.stop],
        "image_pred_logits": row.image_logits_I2[None],
        "image_scores": scores[None],
        "image_keep_index": torch.tensor([row.image_kept]),
        "image_topk_margin": best[kept - 1 : kept] - best[kept : kept + 1],
        **_cache(row, model.sparse["sparse_layer"]),
    }
    if shape.question:
        asked = slice(question.start, question.stop - 1)
        arrays["instruct_pred_logits"] = row.question_logits_N2[None, asked]
        arrays["instruct_decision"] = row.keep_N[None, asked]
    return arrays


def generation(model: Reference, shape: Shape) -> dict[str, Tensor]:
    ids, pixels, _ = prompt(shape, 2)
    tokens: list[int] = []
    for _ in range(STEPS):
        row = model.run(ids, pixels, [[token] for token in tokens])
        tokens.append(int(row.logits_NV[-1].argmax()))
    given = int((row.call_N == 0).sum())
    logits = row.logits_NV[given - 1 :][None]
    best = logits.topk(2).values
    cache = _cache(row, model.sparse["sparse_layer"])
    return cache | {
        "input_ids": torch.tensor([ids]),
        "pixel_values": pixels[None],
        "tokens": torch.tensor([tokens]),
        "step_logits": logits,
        "final_logits": logits[:, -1],
        "step_top1_margin": best[..., 0] - best[..., 1],
        "out_pred_logits": row.text_logits_N2[None, given:],
        "keep_decision": row.keep_N[None, given:],
        "position_ids_prefill_after": (~row.vanished_N[:given]).nonzero()[None, :, 0],
        "position_ids_decode": torch.arange(given, given + STEPS - 1)[None],
        "true_cache_length": cache["kv_len_per_layer"][:, None],
        "final_last_hidden_state": row.last_hidden_NC[None, -1:],
    }


def dialogue(model: Reference, shape: Shape) -> dict[str, Tensor]:
    ids, pixels, generator = prompt(shape, 3)
    fed = generator.integers(5, min(shape.vocabulary, 300), 15).tolist()
    calls = [[token] for token in fed[:5]] + [fed[5:11]] + [[token] for token in fed[11:]]
    rows = [model.run(ids, pixels, calls[:count]) for count in range(len(calls) + 1)]
    row, split = rows[-1], model.sparse["sparse_layer"]
    shown_N = ~row.vanished_N
    decided_N = (row.call_N > 0) & torch.tensor([len(["", *calls][call]) == 1 for call in row.call_N])
    if shape.question:
        decided_N = row.call_N > 0
    decision_N = torch.where(decided_N, row.keep_N.long(), -1)
    cache = _cache(row, split)
    del cache["kv_len_per_layer"]
    return cache | {
        "input_ids": torch.tensor([ids]),
        "pixel_values": pixels[None],
        "fed_tokens": torch.tensor(fed),
        "call_fed_lens": torch.tensor([len(ids), *map(len, calls)]),
        "call_logit_lens": torch.bincount(row.call_N[shown_N]),
        "logits": row.logits_NV[shown_N],
        "decision": decision_N[shown_N],
        "position_ids_sparse": shown_N.nonzero()[:, 0],
        "kv_len_per_call_layer": torch.stack([_cache(r, split)["kv_len_per_layer"] for r in rows]),
    }
