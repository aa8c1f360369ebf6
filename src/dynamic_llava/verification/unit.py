"""Files ``h_*``: the masked attention of training alone, at several scales of the scores.

Legend: B batch, H heads, N tokens, D head size.
"""

from __future__ import annotations

import torch

from dynamic_llava.core.attention.definition import masked_softmax
from dynamic_llava.core.view import causal
from dynamic_llava.verification.comparison import Comparison
from dynamic_llava.verification.files import GoldenFile
from dynamic_llava.verification.training import OFFICIAL_EPS

UNIT_TOLERANCE = 1e-5
UNIT_GRADIENT_TOLERANCE = 1e-4  # relative where above 1


def check_unit(file: GoldenFile, comparison: Comparison) -> None:
    """Compare weights, output and all gradients with the official eps, and what the eps lets through."""
    for scale in (key.removesuffix("q") for key in file.keys if key.endswith("_q")):
        q_BHND, k_BHND, v_BHND, policy_BN1 = (
            file[scale + key].requires_grad_() for key in ("q", "k", "v", "policy")
        )
        hidden_NN = ~causal(q_BHND.shape[2], q_BHND.device)
        scores_BHNN = (q_BHND @ k_BHND.mT * q_BHND.shape[-1] ** -0.5).masked_fill(hidden_NN, -torch.inf)
        weights_BHNN = masked_softmax(scores_BHNN, policy_BN1[..., 0], eps=OFFICIAL_EPS)
        out_BHND = weights_BHNN @ v_BHND
        (out_BHND * file[f"{scale}loss_weight"]).sum().backward()
        exact_BHNN = masked_softmax(scores_BHNN, policy_BN1[..., 0])
        comparison.close(f"{scale}weights", weights_BHNN, UNIT_TOLERANCE)
        comparison.close(f"{scale}out", out_BHND, UNIT_TOLERANCE)
        comparison.close(
            f"{scale}maxdiff_vs_hard_mask_softmax", (weights_BHNN - exact_BHNN).abs().max(), UNIT_TOLERANCE
        )
        for name, tensor in (("q", q_BHND), ("k", k_BHND), ("v", v_BHND), ("policy", policy_BN1)):
            if tensor.grad is not None:
                comparison.close(f"{scale}d{name}", tensor.grad, UNIT_GRADIENT_TOLERANCE, relative=True)
