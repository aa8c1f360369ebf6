"""DivPrune (Alvar et al., CVPR 2025, arXiv 2503.02175): the kept image tokens differ as much as can be."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from dynamic_llava.methods.base import ImageMethod, Pictures
from dynamic_llava.methods.top_k import keep_count


class DivPrune(ImageMethod):
    """Choose greedily so that the least distance between two chosen tokens is large (max-min diversity).

    The distance is one minus the cosine. The first token is the one whose nearest other token is farthest
    away; each further one is the farthest from those already chosen (algorithm 1). The paper compares what
    enters layer 0; here it is what enters layer l.
    """

    def score(self, pictures: Pictures) -> Tensor:
        """Score by the order in which the tokens are chosen, the first highest; 0 for the others."""
        unit_KIC = F.normalize(pictures.hidden_KIC.float(), dim=-1)
        distance_KII = 1 - unit_KIC @ unit_KIC.mT
        count, tokens, _ = distance_KII.shape
        scores_KI = distance_KII.new_zeros(count, tokens)
        own_II = torch.eye(tokens, dtype=torch.bool, device=distance_KII.device)
        nearest_KI = distance_KII.masked_fill(own_II, torch.inf).amin(-1)
        chosen = keep_count(tokens, pictures.rate)
        for number in range(chosen):
            best_K1 = nearest_KI.argmax(-1, keepdim=True)
            scores_KI.scatter_(1, best_K1, chosen - number)
            to_best_KI = distance_KII.gather(1, best_K1[..., None].expand(-1, 1, tokens))[:, 0]
            nearest_KI = to_best_KI if number == 0 else nearest_KI.minimum(to_best_KI)
            nearest_KI = nearest_KI.masked_fill(scores_KI > 0, -torch.inf)
        return scores_KI
