"""Softmax attention over keys weighted by a policy, in memory that grows with N and not with N x N.

The definition is :func:`~dynamic_llava.core.attention.definition.masked_softmax`. Both passes go block by
block: some heads, some queries, and the keys that these may see. The backward pass computes the scores S of a
block anew.

A query's own key is exempt from the policy P, so it is taken apart from the other keys and hidden among
them. With E = exp(S - highest) and Z = E P + E_own, the output is O = (E P V + E_own V_own) / Z. With its
gradient dO and G = E / Z * (dO V^T - rowsum(dO * O)), dS = G * P, and dP sums G over queries and heads.

Legend: B batch, N tokens, H heads, G key/value heads, R = H / G, D head size; Q queries, S keys of a block.
Inside, everything is ``[B, G, R, N, D]``, with 1 in place of R for what belongs to keys.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


class BlockSize(NamedTuple):
    """How much is computed at once: queries, and about how many scores."""

    queries: int
    scores: int


CPU_BLOCK = BlockSize(queries=64, scores=2**20)  # 4 MB: small enough for a processor's cache
GPU_BLOCK = BlockSize(queries=256, scores=2**24)  # 64 MB: few, large kernels


class Block(NamedTuple):
    """Where a block lies in ``[B, G, R, N, D]``: its queries, and the keys that they may see."""

    queries: tuple[slice, slice, slice, slice]
    keys: tuple[slice, slice, slice, slice]


def _blocks(q_BGRND: Tensor, is_causal: bool) -> Iterator[Block]:
    """Yield the blocks; one holds several rows only where they fit with all of their heads."""
    batch, groups, repeats, length, _ = q_BGRND.shape
    size = CPU_BLOCK if q_BGRND.device.type == "cpu" else GPU_BLOCK
    group_scores = repeats * min(size.queries, length) * length
    groups_at_once = min(groups, max(1, size.scores // group_scores))
    rows_at_once = max(1, size.scores // (group_scores * groups))
    for row in range(0, batch, rows_at_once):
        for group in range(0, groups, groups_at_once):
            heads = (slice(row, row + rows_at_once), slice(group, group + groups_at_once), slice(None))
            for start in range(0, length, size.queries):
                stop = min(start + size.queries, length)
                yield Block((*heads, slice(start, stop)), (*heads, slice(0, stop if is_causal else length)))


def _hidden(visible_B1NN: Tensor | None, block: Block, device: torch.device) -> Tensor:
    """Return what a block's queries do not see, and their own keys: bool ``[B or 1, 1, 1, Q, S]``."""
    rows, _, _, queries = block.queries
    keys = block.keys[-1]
    if visible_B1NN is None:
        every_QS = torch.ones(queries.stop - queries.start, keys.stop, dtype=torch.bool, device=device)
        return every_QS.triu(queries.start)[None, None, None]
    rows = rows if visible_B1NN.shape[0] > 1 else slice(None)
    hidden_B11QS = ~visible_B1NN[rows, :, None, queries, keys]
    hidden_B11QS[..., queries].diagonal(dim1=-2, dim2=-1).fill_(True)
    return hidden_B11QS


def _flat(x_BGRND: Tensor) -> Tensor:
    """Return ``[B G, R N, D]``: heads that share a key are more queries to it, so keys are not repeated."""
    return x_BGRND.flatten(2, 3).flatten(0, 1)


def _product(x_BGRNS: Tensor, y_BG1SD: Tensor) -> Tensor:
    """Return ``x y``, as ``[B, G, R, N, D]``."""
    return (_flat(x_BGRNS) @ _flat(y_BG1SD)).view(*x_BGRNS.shape[:-1], y_BG1SD.shape[-1])


def _add_product(sum_BG1SD: Tensor, x_BGRQS: Tensor, y_BGRQD: Tensor) -> None:
    """Add ``x^T y``, summed over the heads that share a key, in place."""
    view = sum_BG1SD.view(-1, *sum_BG1SD.shape[-2:])  # unlike flatten, never a copy
    view.baddbmm_(_flat(x_BGRQS).mT, _flat(y_BGRQD))


def _dot(x_BGRND: Tensor, y_BGRND: Tensor) -> Tensor:
    """Return the products of vectors, ``[B, G, R, N, 1]``."""
    return (x_BGRND * y_BGRND).sum(-1, keepdim=True)


class _MaskedAttention(torch.autograd.Function):
    """Saves what it is given, its output, and two numbers for each query: highest score and sum Z."""

    @staticmethod
    def forward(
        ctx: Any,
        q_BHND: Tensor,
        k_BGND: Tensor,
        v_BGND: Tensor,
        policy_BN: Tensor,
        visible_B1NN: Tensor | None,
        scaling: float,
        is_causal: bool,
        highest_dropped: float,
    ) -> Tensor:
        q, k, v, policy = _unfold(q_BHND, k_BGND, v_BGND, policy_BN)
        is_dropped_B111N = (policy_BN == 0)[:, None, None, None]
        weighted_v = policy * v
        out = k.new_empty(q.shape)
        highest, total = k.new_empty(*q.shape[:-1], 1), k.new_empty(*q.shape[:-1], 1)
        for block in _blocks(q, is_causal):
            queries, keys = block
            q_block = q[queries].to(k.dtype) * scaling
            own = _dot(q_block, k[queries])
            scores = _product(q_block, k[keys].mT)
            # Dropped keys weigh nothing: hidden here, they need no clamp. The backward pass does see them.
            hidden = _hidden(visible_B1NN, block, q.device) | is_dropped_B111N[keys[0], ..., keys[-1]]
            highest[queries] = high = scores.masked_fill_(hidden, -torch.inf).amax(-1, True).maximum(own)
            scores.sub_(high).exp_()
            own.sub_(high).exp_()
            total[queries] = z = _product(scores, policy[keys]) + own
            out[queries] = (_product(scores, weighted_v[keys]) + own * v[queries]).div_(z)
        out_BHND = out.flatten(1, 2)
        ctx.save_for_backward(q_BHND, k_BGND, v_BGND, policy_BN, visible_B1NN, out_BHND, highest, total)
        ctx.scaling, ctx.is_causal, ctx.highest_dropped = scaling, is_causal, highest_dropped
        return out_BHND.to(v_BGND.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_BHND: Tensor) -> tuple[Tensor | None, ...]:
        with torch.autocast(grad_BHND.device.type, enabled=False):
            return _MaskedAttention._gradients(ctx, grad_BHND)

    @staticmethod
    def _gradients(ctx: Any, grad_BHND: Tensor) -> tuple[Tensor | None, ...]:
        q_BHND, k_BGND, v_BGND, policy_BN, visible_B1NN, out_BHND, highest, total = ctx.saved_tensors
        q, k, v, policy = _unfold(q_BHND, k_BGND, v_BGND, policy_BN)
        grad, out = (x_BHND.view_as(q) for x_BHND in (grad_BHND.contiguous(), out_BHND))
        weighted_k = policy * k
        dq, dk, dv = torch.empty_like(out), torch.zeros_like(k), torch.zeros_like(v)
        dpolicy_BN = k.new_zeros(policy_BN.shape)
        own_weight, own_g = torch.empty_like(total), torch.empty_like(total)
        for block in _blocks(q, ctx.is_causal):
            queries, keys = block
            q_block = q[queries].to(k.dtype) * ctx.scaling
            grad_block = grad[queries] / total[queries]  # E / Z, without a pass over E
            average = _dot(grad_block, out[queries])
            hidden = _hidden(visible_B1NN, block, q.device)
            scores = _product(q_block, k[keys].mT).masked_fill_(hidden, -torch.inf)
            weights = scores.sub_(highest[queries]).clamp_(max=ctx.highest_dropped).exp_()
            _add_product(dv[keys], weights, grad_block)
            g = _product(grad_block, v[keys].mT).sub_(average).mul_(weights)
            _add_product(dk[keys], g, q_block)
            dpolicy_BN[keys[0], keys[-1]] += g.sum((1, 2, 3))
            own = (_dot(q_block, k[queries]) - highest[queries]).exp_()
            own_weight[queries] = own / total[queries]
            own_g[queries] = g_block = (_dot(grad_block, v[queries]) - average) * own
            dq[queries] = (_product(g, weighted_k[keys]) + g_block * k[queries]).mul_(ctx.scaling)
        dk.mul_(policy).add_((own_g * q).sum(2, keepdim=True), alpha=ctx.scaling)
        dv.mul_(policy).add_((own_weight * grad).sum(2, keepdim=True))
        gradients = (dq.view_as(q_BHND), dk.squeeze(2), dv.squeeze(2), dpolicy_BN)
        given = (q_BHND, k_BGND, v_BGND, policy_BN)
        return *(ours.to(its) for ours, its in zip(gradients, given, strict=True)), None, None, None, None


def _unfold(
    q_BHND: Tensor, k_BGND: Tensor, v_BGND: Tensor, policy_BN: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return all as ``[B, G, R or 1, N, D or 1]``, cast but for the queries, which each block casts."""
    dtype, groups = torch.promote_types(q_BHND.dtype, torch.float32), k_BGND.shape[1]
    k_BG1ND, v_BG1ND = (x_BGND[:, :, None].to(dtype).contiguous() for x_BGND in (k_BGND, v_BGND))
    policy_BG1N1 = policy_BN.to(dtype)[:, None, None, :, None].expand(-1, groups, -1, -1, -1)
    return q_BHND.unflatten(1, (groups, -1)), k_BG1ND, v_BG1ND, policy_BG1N1


def masked_attention(
    q_BHND: Tensor,
    k_BGND: Tensor,
    v_BGND: Tensor,
    policy_BN: Tensor,
    visible_B1NN: Tensor | None,
    scaling: float,
    dropped_key_bound: float = 1e6,
) -> Tensor:
    """Attend with keys weighted by a policy; each query sees its own key in full.

    Parameters
    ----------
    q_BHND
        Queries.
    k_BGND, v_BGND
        Keys and values of the same length N; G divides H, and each serves H / G heads in turn.
    policy_BN
        Weight of each key in [0, 1]; gets a gradient, also where it is 0 (straight-through).
    visible_B1NN
        Bool ``[B or 1, 1, N, N]``, True where a query sees a key; the diagonal counts as True. None stands
        for plain causal attention. Where no query sees a later key, blocks leave out the keys after them.
    scaling
        Factor on the scores.
    dropped_key_bound
        See :func:`~dynamic_llava.core.attention.definition.masked_softmax`.

    Returns
    -------
    Tensor
        ``[B, H, N, D]``, in the dtype of ``v_BGND``, computed in float32 (float64 for such queries), also
        under autocast. Equal to :func:`~dynamic_llava.core.attention.definition.masked_softmax` times the
        values.
    """
    # One wait for a GPU, in exchange for half of the work.
    is_causal = visible_B1NN is None or not bool(visible_B1NN.any(0).triu(1).any())
    with torch.autocast(q_BHND.device.type, enabled=False):
        return _MaskedAttention.apply(
            q_BHND, k_BGND, v_BGND, policy_BN, visible_B1NN, scaling, is_causal, math.log(dropped_key_bound)
        )
