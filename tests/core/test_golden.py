"""The official code's numbers, config A: indices, decisions and tokens exactly, logits to 2e-4."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tests.core import golden
from torch import Tensor
from transformers import LlavaForConditionalGeneration

from dynamic_llava import Sparsifier
from dynamic_llava.attention import masked_attention
from dynamic_llava.masks import causal
from dynamic_llava.selection import masked_softmax

DATA = Path(__file__).parents[1] / "data"
IMAGE_TOKENS = 16
TOLERANCE = 2e-4


def attached(
    data: dict[str, Tensor], attention: str
) -> tuple[LlavaForConditionalGeneration, Sparsifier, dict]:
    used = [data[key] for key in ("input_ids", "tokens", "fed_tokens") if key in data]
    token = golden.unused_token(*used)
    model, sparsifier = golden.build("A", attention, token)
    input_ids = golden.expand(data["input_ids"], token, IMAGE_TOKENS)
    return model, sparsifier, {"input_ids": input_ids, "pixel_values": data["pixel_values"]}


def generate(
    model: LlavaForConditionalGeneration, inputs: dict, steps: int, **options: bool
) -> tuple[Tensor, Tensor]:
    out = model.generate(
        **inputs,
        max_new_tokens=steps,
        do_sample=False,
        return_dict_in_generate=True,
        output_logits=True,
        **options,
    )
    return out.sequences[:, -steps:], torch.stack(out.logits, dim=1)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize(
    "name", ["a_prefill_b1", "a_prefill_b2", "a_prefill_b1_keep0.2", "a_prefill_b2_keep0.2"]
)
@torch.no_grad()
def test_prefill(name: str, attention: str) -> None:
    data = golden.arrays(f"A/{name}")
    model, sparsifier, inputs = attached(data, attention)
    if "keep0.2" in name:
        sparsifier.config.image_keep_rate = 0.2
    out = model(**inputs)
    torch.testing.assert_close(out.logits, data["logits"], atol=TOLERANCE, rtol=0)
    assert [kept.tolist() for kept in sparsifier.report.image_kept] == data["image_keep_index"].tolist()
    batch = len(data["input_ids"])
    assert sparsifier.report.kv_lengths.tolist() == [[n] * batch for n in data["kv_len_per_layer"].tolist()]
    for layer in (0, 1, 2, 5):
        held = data["kv_len_per_layer"][layer]
        for ours, name in (
            (out.past_key_values.layers[layer].keys, "k"),
            (out.past_key_values.layers[layer].values, "v"),
        ):
            torch.testing.assert_close(
                ours[:, :, :held], data[f"{name}_layer{layer}"], atol=TOLERANCE, rtol=0
            )


@pytest.mark.parametrize("name", ["b_full_b1", "b_full_b2"])
@torch.no_grad()
def test_full_context(name: str) -> None:
    data = golden.arrays(f"A/{name}")
    model, sparsifier, inputs = attached(data, "sdpa")
    sparsifier.config.sparsify_image = False
    torch.testing.assert_close(model(**inputs).logits, data["logits"], atol=TOLERANCE, rtol=0)
    sparsifier.detach()
    torch.testing.assert_close(model(**inputs).logits, data["logits"], atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize(
    ("name", "image", "text"),
    [
        ("c_gen_cache_b1", True, True),
        ("c_gen_visiononly_b1", True, False),
        ("c_gen_outtextonly_b1", False, True),
        ("c_gen_full_b1", False, False),
    ],
)
def test_cached_decode(name: str, image: bool, text: bool, attention: str) -> None:
    data = golden.arrays(f"A/{name}")
    model, sparsifier, inputs = attached(data, attention)
    sparsifier.config.sparsify_image, sparsifier.config.sparsify_text = image, text
    tokens, logits = generate(model, inputs, 40)
    assert torch.equal(tokens, data["tokens"])
    torch.testing.assert_close(logits, data["step_logits"], atol=TOLERANCE, rtol=0)
    assert sparsifier.report.kv_lengths[:, 0].tolist() == data["kv_len_per_layer"].tolist()
    if text:
        assert torch.equal(sparsifier.report.text_kept[0], data["keep_decision"][0].bool())


def test_cached_decode_of_two_rows_equals_each_row_alone() -> None:
    """The official code is wrong here; ``ref_row*`` is what it computes for each row alone."""
    data = golden.arrays("A/c_gen_cache_b2_official")
    data["tokens"] = torch.cat([data["ref_row0_tokens"], data["ref_row1_tokens"]])
    model, sparsifier, inputs = attached(data, "sdpa")
    tokens, logits = generate(model, inputs, 40)
    for row in (0, 1):
        assert torch.equal(tokens[row], data[f"ref_row{row}_tokens"][0])
        torch.testing.assert_close(logits[row], data[f"ref_row{row}_step_logits"][0], atol=TOLERANCE, rtol=0)
        assert torch.equal(sparsifier.report.text_kept[row], data[f"ref_row{row}_keep_decision"][0].bool())
        assert (
            sparsifier.report.kv_lengths[:, row].tolist() == data[f"ref_row{row}_kv_len_per_layer"].tolist()
        )


def test_decode_without_cache_equals_cached() -> None:
    """The official rule for decoding without a cache contradicts its own cached rule; ours does not."""
    data = golden.arrays("A/d_gen_cache_same_input_b1")
    model, sparsifier, inputs = attached(data, "sdpa")
    tokens, logits = generate(model, inputs, 20, use_cache=False)
    assert torch.equal(tokens, data["tokens"])
    torch.testing.assert_close(logits, data["step_logits"], atol=TOLERANCE, rtol=0)
    assert torch.equal(sparsifier.report.text_kept[0], data["keep_decision"][0].bool())
    assert sparsifier.report.kv_lengths.sum() == 0


@torch.no_grad()
def test_new_turn_with_cache() -> None:
    data = golden.arrays("A/f_multiturn")
    model, sparsifier, inputs = attached(data, "sdpa")
    fed = data["fed_tokens"].split(data["call_fed_lens"].tolist()[1:])
    logits, lengths, past = [], [], None
    for ids in (inputs["input_ids"][0], *fed):
        pictures = {"pixel_values": inputs["pixel_values"]} if past is None else {}
        out = model(input_ids=ids[None], past_key_values=past, **pictures)
        past = out.past_key_values
        logits.append(out.logits[0])
        lengths.append(sparsifier.report.kv_lengths[:, 0].tolist())
    torch.testing.assert_close(torch.cat(logits), data["logits"], atol=TOLERANCE, rtol=0)
    assert lengths == data["kv_len_per_call_layer"].tolist()


@pytest.mark.parametrize("name", ["e_train", "e_train2", "e_train_visiononly"])
def test_training_pass(name: str) -> None:
    data = golden.arrays(f"A/{name}")
    token = golden.unused_token(data["input_ids"])
    model, sparsifier = golden.build("A", "sdpa", token)
    model.train()
    sparsifier.tau = float(data["tau"])
    sparsifier.config.sparsify_text = "noise_output_text" in data
    labels, valid = data["expanded_labels"], data["expanded_attention_mask"]
    answer_mask = torch.zeros_like(valid)
    for row, label in enumerate(labels):
        start = int((label == -100).logical_and(valid[row]).nonzero().max()) + 1
        answer_mask[row, start : int(valid[row].sum())] = True
    noises = [data["noise_image"]]
    if sparsifier.config.sparsify_text:
        noises = [to_the_right(data["noise_output_text"], answer_mask.sum(-1)), *noises]
    sparsifier.noise = lambda logits: noises.pop(0)
    out = model(
        input_ids=golden.expand(data["input_ids"], token, IMAGE_TOKENS),
        pixel_values=data["pixel_values"],
        attention_mask=valid.long(),
        labels=labels,
        answer_mask=answer_mask,
    )
    image_loss, text_loss, _ = sparsifier.ratio_loss()
    loss = out.loss + sparsifier.config.ratio_weight * (image_loss + text_loss)
    loss.backward()

    assert not noises
    torch.testing.assert_close(out.logits[valid], data["logits"][valid], atol=TOLERANCE, rtol=0)
    torch.testing.assert_close(sparsifier.report.image_mask_BI, data["image_mask"], atol=1e-6, rtol=0)
    torch.testing.assert_close(image_loss, data["loss_image_mask_unweighted"], atol=1e-6, rtol=0)
    torch.testing.assert_close(out.loss, data["loss_ce"], atol=1e-5, rtol=0)
    torch.testing.assert_close(loss, data["loss_total"], atol=1e-4, rtol=0)
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    names = golden.strings(f"A/{name}", "grad_names")
    assert len(names) > 80
    for official, norm in zip(names, data["grad_norms"], strict=True):
        ours = gradients[golden.rename(official)].norm().double()
        torch.testing.assert_close(ours, norm, atol=1e-4, rtol=1e-3)
    for key in (key for key in data if key.startswith("grad__")):
        ours = gradients[golden.rename(key.replace("grad__", "model."))]
        torch.testing.assert_close(ours, data[key], atol=1e-4, rtol=1e-3)


def to_the_right(noise_BA2: Tensor, length_B: Tensor) -> Tensor:
    """Move the noise of shorter answers from the left to the right of the padding."""
    return torch.stack(
        [torch.roll(n, len(n) - int(k), dims=0) for n, k in zip(noise_BA2, length_B, strict=True)]
    )


@pytest.mark.parametrize("scale", ["s1", "s6", "s20"])
def test_masked_attention_unit(scale: str) -> None:
    """With the official eps, weights, output and all gradients are the official ones."""
    unit = {key.removeprefix(f"{scale}_"): value for key, value in golden.arrays("h_attn_unit", DATA).items()}
    q, k, v, policy = (unit[key].clone().requires_grad_() for key in ("q", "k", "v", "policy"))
    scores = (q @ k.mT * q.shape[-1] ** -0.5).masked_fill(~causal(q.shape[2], q.device), -torch.inf)
    weights = masked_softmax(scores, policy[..., 0], eps=1e-6)
    out = weights @ v
    (out * unit["loss_weight"]).sum().backward()
    torch.testing.assert_close(weights, unit["weights"], atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(out, unit["out"], atol=1e-5, rtol=1e-5)
    for ours, name in ((q, "dq"), (k, "dk"), (v, "dv"), (policy, "dpolicy")):
        torch.testing.assert_close(ours.grad, unit[name], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("scale", ["s1", "s6", "s20"])
def test_fast_masked_attention_equals_its_definition(scale: str) -> None:
    unit = {key.removeprefix(f"{scale}_"): value for key, value in golden.arrays("h_attn_unit", DATA).items()}
    visible = causal(unit["q"].shape[2], unit["q"].device)[None, None]
    scaling = unit["q"].shape[-1] ** -0.5
    results = []
    for is_fast in (True, False):
        q, k, v, policy = (unit[key].clone().requires_grad_() for key in ("q", "k", "v", "policy"))
        if is_fast:
            out = masked_attention(q, k, v, policy[..., 0], visible, scaling)
        else:
            out = masked_softmax((q @ k.mT * scaling).masked_fill(~visible, -torch.inf), policy[..., 0]) @ v
        (out * unit["loss_weight"]).sum().backward()
        results.append([out, q.grad, k.grad, v.grad, policy.grad])
    for fast, definition in zip(*results, strict=True):
        assert fast.isfinite().all()
        torch.testing.assert_close(fast, definition, atol=1e-5, rtol=1e-3)


def test_official_eps_is_negligible_where_no_dropped_key_dominates() -> None:
    unit = {key.removeprefix("s1_"): value for key, value in golden.arrays("h_attn_unit", DATA).items()}
    q, k, v, policy = (unit[key].clone().requires_grad_() for key in ("q", "k", "v", "policy"))
    visible = causal(q.shape[2], q.device)[None, None]
    out = masked_attention(q, k, v, policy[..., 0], visible, q.shape[-1] ** -0.5)
    (out * unit["loss_weight"]).sum().backward()
    torch.testing.assert_close(out, unit["out"], atol=1e-4, rtol=1e-4)
    for ours, name in ((q, "dq"), (k, "dk"), (v, "dv"), (policy, "dpolicy")):
        torch.testing.assert_close(ours.grad, unit[name], atol=1e-3, rtol=1e-3)
