"""The official code's numbers, where they lie beside the repository; its attention unit comes along."""

from __future__ import annotations

import json
from importlib.resources import files
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tests.verification.forge.reference import Reference
from torch import Tensor

from dynamic_llava.core.attention.blocked import masked_attention
from dynamic_llava.core.attention.definition import masked_softmax
from dynamic_llava.core.masks import causal
from dynamic_llava.verification import GoldenFile, Status, verify

ROOT = Path(__file__).parents[3] / "shared" / "golden"
DATA = Path(str(files("dynamic_llava"))) / "assets" / "vectors"

needs_golden = pytest.mark.skipif(
    not ROOT.is_dir(), reason="the golden vectors of the official code are not beside the repository"
)


@needs_golden
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_every_golden_file_passes(attention: str) -> None:
    results = verify(ROOT, attention)
    assert not [result for result in results if result.status in (Status.FAIL, Status.NOT_COMPARED)]
    files = {f"{path.parent.name}/{path.name.removesuffix('.npz')}" for path in ROOT.glob("*/*.npz")}
    assert {result.file for result in results if result.status is Status.PASS} == files


@needs_golden
def test_only_the_official_defects_are_not_reproduced() -> None:
    defective = [result for result in verify(ROOT / "A") if result.status is Status.DEFECT]
    assert {result.file.removeprefix("A/") for result in defective} == {
        "c_gen_cache_b2_official",
        "d_gen_nocache_b1",
        "d_gen_nocache_b2",
        "d_gen_nocache_stale_b1",
    }
    assert not [result for result in defective if result.quantity.startswith("ref_row")]
    assert all("official code" in result.reason for result in defective)


@needs_golden
def test_the_reference_of_the_forged_files_computes_the_golden_numbers() -> None:
    checkpoint = ROOT / "A" / "checkpoint"
    vision = json.loads((ROOT / "A" / "vision_tower" / "config.json").read_text())
    config = json.loads((checkpoint / "config.json").read_text())
    reference = Reference(load_file(checkpoint / "model.safetensors"), config, vision)
    golden = GoldenFile(ROOT / "A" / "c_gen_cache_b1.npz")
    calls = [[token] for token in golden["tokens"][0, :-1].tolist()]
    row = reference.run(golden["input_ids"][0].tolist(), golden["pixel_values"][0], calls)
    torch.testing.assert_close(row.logits_NV[-40:], golden["step_logits"][0], atol=1e-4, rtol=0)
    assert torch.equal(row.keep_N[-39:], golden["keep_decision"][0])


def test_masked_attention_unit() -> None:
    """With the official eps, weights, output and all gradients are the official ones."""
    results = verify(DATA)
    assert {result.status for result in results} == {Status.PASS}
    assert len(results) == 3 * 7  # weights, out, four gradients and the effect of eps, at three scales


def unit(scale: str) -> dict[str, Tensor]:
    """Inputs and expected outputs at one scale of the scores."""
    file = GoldenFile(DATA / "h_attn_unit.npz")
    return {key.removeprefix(f"{scale}_"): file[key] for key in file.starting(f"{scale}_")}


@pytest.mark.parametrize("scale", ["s1", "s6", "s20"])
def test_fast_masked_attention_equals_its_definition(scale: str) -> None:
    given = unit(scale)
    visible = causal(given["q"].shape[2], given["q"].device)[None, None]
    scaling = given["q"].shape[-1] ** -0.5
    results = []
    for is_fast in (True, False):
        q, k, v, policy = (given[key].clone().requires_grad_() for key in ("q", "k", "v", "policy"))
        if is_fast:
            out = masked_attention(q, k, v, policy[..., 0], visible, scaling)
        else:
            out = masked_softmax((q @ k.mT * scaling).masked_fill(~visible, -torch.inf), policy[..., 0]) @ v
        (out * given["loss_weight"]).sum().backward()
        results.append([out, q.grad, k.grad, v.grad, policy.grad])
    for fast, definition in zip(*results, strict=True):
        assert fast.isfinite().all()
        torch.testing.assert_close(fast, definition, atol=1e-5, rtol=1e-3)


def test_official_eps_is_negligible_where_no_dropped_key_dominates() -> None:
    given = unit("s1")
    q, k, v, policy = (given[key].clone().requires_grad_() for key in ("q", "k", "v", "policy"))
    visible = causal(q.shape[2], q.device)[None, None]
    out = masked_attention(q, k, v, policy[..., 0], visible, q.shape[-1] ** -0.5)
    (out * given["loss_weight"]).sum().backward()
    torch.testing.assert_close(out, given["out"], atol=1e-4, rtol=1e-4)
    for ours, name in ((q, "dq"), (k, "dk"), (v, "dv"), (policy, "dpolicy")):
        torch.testing.assert_close(ours.grad, given[name], atol=1e-3, rtol=1e-3)
