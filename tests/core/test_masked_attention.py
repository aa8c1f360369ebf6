"""Masked attention in blocks: its definition, its gradients, and what it keeps in memory."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dynamic_llava.core import view
from dynamic_llava.core.attention import blocked as module
from dynamic_llava.core.attention.blocked import BlockSize, masked_attention
from dynamic_llava.core.attention.definition import masked_softmax
from dynamic_llava.core.view import causal

VISIBILITIES = ["none", "causal", "left padding", "right padding", "any"]


def definition(
    q: Tensor, k: Tensor, v: Tensor, policy: Tensor, visible: Tensor | None, scaling: float
) -> Tensor:
    """Equation 6 in the dtype of the inputs, for :func:`masked_softmax` computes in float32."""
    length, repeats = q.shape[2], q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(repeats, dim=1), v.repeat_interleave(repeats, dim=1)
    own = torch.eye(length, dtype=torch.bool)
    visible = causal(length, q.device)[None, None] if visible is None else visible
    scores = (q @ k.mT * scaling).masked_fill(~visible, -torch.inf)
    weigh = torch.where(own, 1.0, policy[:, None, None, :])
    highest = scores.masked_fill(weigh == 0, -torch.inf).amax(-1, keepdim=True)
    weighted = (scores - highest).clamp(max=math.log(1e6)).exp() * weigh
    return weighted / weighted.sum(-1, keepdim=True) @ v


def inputs(
    batch: int, groups: int, repeats: int, length: int, size: int, seed: int = 0, scale: float = 1.0
) -> list[Tensor]:
    """Queries, keys, values and a policy, in float64; as in a layer, heads lie beside each other."""
    generator = torch.Generator().manual_seed(seed)

    def draw(heads: int, spread: float) -> Tensor:
        x = torch.randn(batch, length, heads, size, dtype=torch.float64, generator=generator)
        return (x * spread).transpose(1, 2)

    drawn = [draw(groups * repeats, scale), draw(groups, scale), draw(groups, 1.0)]
    return [*drawn, torch.rand(batch, length, dtype=torch.float64, generator=generator)]


def draw_visible(kind: str, batch: int, length: int, seed: int = 0) -> Tensor | None:
    """Who sees whom; every token at least itself."""
    if kind == "none":
        return None
    generator = torch.Generator().manual_seed(seed)
    if kind == "any":
        seen = torch.rand(batch, 1, length, length, generator=generator) < 0.5
        return view.visible(seen, batch, length, seen.device)
    mask = None
    if kind != "causal":
        padding = torch.randint(length + 1, (batch, 1), generator=generator)
        column = torch.arange(length)
        mask = column >= padding if kind == "left padding" else column < length - padding
    return view.visible(mask, batch, length, torch.device("cpu"))


def results(
    attention: Callable[..., Tensor], given: list[Tensor], visible: Tensor | None, scaling: float
) -> list[Tensor]:
    """The output and the gradients to queries, keys, values and policy."""
    leaves = [x.clone().requires_grad_() for x in given]
    out = attention(*leaves, visible, scaling)
    generator = torch.Generator().manual_seed(9)
    out.backward(torch.randn(out.shape, dtype=torch.float64, generator=generator).to(out.dtype))
    return [out.detach(), *(leaf.grad for leaf in leaves)]


def assert_equal(ours: list[Tensor], expected: list[Tensor], tolerance: float) -> None:
    """Compare up to ``tolerance``, relative to the largest number where that is above 1."""
    for name, x, y in zip(("out", "q", "k", "v", "policy"), ours, expected, strict=True):
        scale = max(1.0, float(y.abs().max()))
        assert float((x - y).abs().max()) <= tolerance * scale, name


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_blocks_equal_the_definition_in_float64(data: st.DataObject) -> None:
    """Any shape, heads that share keys, padding, sizes of blocks; policies hard, soft, all and nothing."""
    batch, groups, repeats = (data.draw(st.integers(1, 3)) for _ in range(3))
    length, seed = data.draw(st.integers(1, 40)), data.draw(st.integers(0, 1000))
    scale = data.draw(st.sampled_from([0.3, 1.0, 4.0]))  # at 4, dropped keys reach the clamp
    given_ = inputs(batch, groups, repeats, length, data.draw(st.integers(1, 9)), seed, scale)
    rate = data.draw(st.sampled_from([None, 0.0, 0.3, 1.0]))
    if rate is not None:
        given_[3] = (given_[3] < rate).double()
    visible = draw_visible(data.draw(st.sampled_from(VISIBILITIES)), batch, length, seed)
    size = BlockSize(data.draw(st.integers(1, 50)), data.draw(st.integers(1, 10_000)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "CPU_BLOCK", size)
        ours = results(masked_attention, given_, visible, 0.5)
    assert_equal(ours, results(definition, given_, visible, 0.5), 1e-10)


@pytest.mark.parametrize("kind", VISIBILITIES)
def test_float32_equals_masked_softmax(kind: str) -> None:
    """With the sizes of blocks that are used, several of them."""
    given_ = [x.float() for x in inputs(2, 2, 2, 150, 16)]
    given_[3][0].round_()
    visible = draw_visible(kind, 2, 150)

    def plain(q: Tensor, k: Tensor, v: Tensor, policy: Tensor, visible: Tensor | None, s: float) -> Tensor:
        k, v = k.repeat_interleave(2, dim=1), v.repeat_interleave(2, dim=1)
        visible = causal(150, q.device) if visible is None else visible
        return masked_softmax((q @ k.mT * s).masked_fill(~visible, -torch.inf), policy) @ v

    assert_equal(
        results(masked_attention, given_, visible, 0.25), results(plain, given_, visible, 0.25), 1e-5
    )


@pytest.mark.parametrize("kind", VISIBILITIES)
def test_gradients_are_those_of_the_function(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CPU_BLOCK", BlockSize(queries=3, scores=40))
    given_ = inputs(2, 2, 2, 7, 3)
    given_[3] = 0.05 + 0.9 * given_[3]  # at 0 the highest score changes: the gradient there is a convention
    leaves = [x.requires_grad_() for x in given_]
    visible = draw_visible(kind, 2, 7)
    assert torch.autograd.gradcheck(lambda *x: masked_attention(*x, visible, 0.5), leaves)


def test_a_dropped_dominant_key_gets_a_bounded_gradient() -> None:
    given_ = inputs(1, 1, 1, 4, 2)
    given_[0][:] = given_[1][:] = 1.0
    given_[1][..., 1, :] = 500.0  # scores far above the others, for queries 2 and 3
    given_[3] = torch.tensor([[1.0, 0.0, 1.0, 1.0]], dtype=torch.float64)
    ours = results(masked_attention, given_, None, 1.0)
    assert_equal(ours, results(definition, given_, None, 1.0), 1e-10)
    assert 1e4 < float(ours[4][0, 1].abs()) < 1e8
    assert float(ours[1].abs().max()) < 1e3  # to queries nothing comes through it


@pytest.mark.parametrize("autocast", [False, True])
def test_half_precision_is_computed_in_float32(autocast: bool) -> None:
    given_ = [x.bfloat16() for x in inputs(1, 2, 2, 70, 8)]
    given_[3] = given_[3].float()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        halves = results(masked_attention, given_, None, 0.5)
    assert [x.dtype for x in halves] == [torch.bfloat16] * 4 + [torch.float32]
    exact = results(definition, [x.double() for x in given_], None, 0.5)
    for half, expected in zip(halves, exact, strict=True):
        torch.testing.assert_close(
            half.double(), expected, rtol=2**-7, atol=2**-7 * float(expected.abs().max())
        )


def saved_bytes(length: int) -> int:
    """Bytes kept between the passes for 8 heads on 2 keys, of size 16."""
    kept: dict[int, int] = {}

    def pack(x: Tensor) -> Tensor:
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    leaves = [x.float().requires_grad_() for x in inputs(1, 2, 4, length, 16)]
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        masked_attention(*leaves, None, 0.25)
    return sum(kept.values())


def test_what_is_saved_grows_with_the_length() -> None:
    """Queries and output of 8 heads, keys and values of 2, the policy, two numbers for each query."""
    numbers = 2 * 8 * 16 + 2 * 2 * 16 + 1 + 2 * 8
    assert saved_bytes(300) == 4 * 300 * numbers
    assert saved_bytes(600) == 4 * 600 * numbers


class Largest(TorchDispatchMode):
    """Records the bytes of the largest tensor that any operation returns."""

    bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        sizes = [x.untyped_storage().nbytes() for x in tree_leaves(out) if isinstance(x, Tensor)]
        self.bytes = max([self.bytes, *sizes])
        return out


@pytest.mark.parametrize("kind", ["none", "left padding"])
def test_no_tensor_of_either_pass_is_n_by_n_for_each_head(kind: str) -> None:
    length, heads = 1024, 16
    leaves = [x.float().requires_grad_() for x in inputs(1, 4, 4, length, 8)]
    visible = draw_visible(kind, 1, length)
    with Largest() as definition_largest:
        definition(*leaves, visible, 0.25).sum().backward()
    assert definition_largest.bytes == 4 * heads * length**2
    with Largest() as largest:
        masked_attention(*leaves, visible, 0.25).sum().backward()
    assert largest.bytes <= 4 * module.CPU_BLOCK.scores == definition_largest.bytes // 16


def test_keys_after_a_causal_block_are_skipped() -> None:
    """A bool that is causal costs what None does; one that looks ahead sees all keys."""
    given_ = inputs(1, 1, 1, 200, 4)

    def keys(visible: Tensor | None) -> list[int]:
        seen: list[int] = []
        blocks = module._blocks

        def record(q: Tensor, is_causal: bool) -> Any:
            for block in blocks(q, is_causal):
                seen.append(block.keys[-1].stop)
                yield block

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(module, "_blocks", record)
            masked_attention(*given_, visible, 0.5)
        return seen

    assert keys(None) == keys(draw_visible("left padding", 1, 200)) == [64, 128, 192, 200]
    assert keys(draw_visible("any", 1, 200)) == [200] * 4
