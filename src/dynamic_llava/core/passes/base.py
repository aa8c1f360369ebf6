"""What the modes of a pass share: what flows through them, decisions on a prompt, removing tokens.

Legend: B batch, K pictures, I image tokens, N tokens fed, L tokens kept, S keys, C channels.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from dynamic_llava.core.attention.interface import KeyWeights
from dynamic_llava.core.attention.probe import Probe
from dynamic_llava.core.cache import SparseCache
from dynamic_llava.core.placeholders import question_mask
from dynamic_llava.core.report import Report
from dynamic_llava.core.view import gather_tokens, ordinals, right_align

if TYPE_CHECKING:
    from dynamic_llava.sparsifier import Sparsifier


@dataclass
class Tokens:
    """What flows into a stage of the decoder.

    ``visible`` is bool ``[B, 1, N, S]`` or None (plain causal); ``key_weights`` are those of a training pass,
    or None; ``probe`` looks at the attention of a stage's last layer.
    """

    hidden_BNC: Tensor
    position_ids: Tensor
    visible: Tensor | None
    key_weights: KeyWeights | None = None
    probe: Probe | None = None


@dataclass(frozen=True)
class Inputs:
    """What a pass knows of its tokens besides their embeddings.

    ``image_positions_KI`` says where the tokens of each picture lie in the flattened ``[B * N]`` input, None
    without pictures; ``token_ids_BN`` is None where embeddings were given.
    """

    image_positions_KI: Tensor | None
    token_ids_BN: Tensor | None
    attention_mask: Tensor | None


class Pass(ABC):
    """One mode of the decoder's pass.

    Parameters
    ----------
    sparsifier
        Makes the decisions.
    report
        Records them.
    given
        See :class:`Inputs`.
    """

    cache: SparseCache | None = None

    def __init__(self, sparsifier: Sparsifier, report: Report, given: Inputs) -> None:
        self.sparsifier = sparsifier
        self.report = report
        self.given = given

    @abstractmethod
    def open(self, hidden_BNC: Tensor) -> Tensor | None:
        """Return who sees whom in the dense layers."""

    @abstractmethod
    def prompt(self, batch: int, length: int, device: torch.device) -> Tensor:
        """Return which of the tokens fed belong to the prompt: bool ``[B, N]``, after :meth:`open`."""

    @abstractmethod
    def select(self, tokens: Tokens) -> Tokens:
        """Return what enters the sparse layers."""

    def close(self) -> Any:
        """End the pass; return what the caller gets as ``past_key_values``."""
        return None

    def probe(self, hidden_BNC: Tensor, visible: Tensor | None) -> Probe | None:
        """Return what looks at the last prompt token's attention, where that ranks image tokens."""
        if self.given.image_positions_KI is None or not self.sparsifier.reads_attention:
            return None
        batch, length, _ = hidden_BNC.shape
        column_N = torch.arange(length, device=hidden_BNC.device)
        last_B = (column_N * self.prompt(batch, length, hidden_BNC.device)).amax(-1)
        return Probe(last_B, visible)

    def attention(self, tokens: Tokens) -> Tensor | None:
        """Return the probe's attention to each picture's image tokens, ``[K, I]``; None without a probe."""
        if tokens.probe is None or self.given.image_positions_KI is None:
            return None
        length = tokens.hidden_BNC.shape[1]
        past = 0 if self.cache is None else int(self.cache.get_seq_length()) - length
        weights_BS = cast(Tensor, tokens.probe.weights_BS)
        return weights_BS[:, past : past + length].flatten()[self.given.image_positions_KI]

    def keep_images(self, tokens: Tokens) -> Tensor | None:
        """Decide on the image tokens; return a bool ``[B, N]``, or None where nothing is dropped."""
        positions_KI, hidden_BNC = self.given.image_positions_KI, tokens.hidden_BNC
        if positions_KI is None:
            return None
        batch, length, _ = hidden_BNC.shape
        hidden_KIC = hidden_BNC.flatten(0, 1)[positions_KI]
        kept_KI, scores_KI = self.sparsifier.keep_image_tokens(hidden_KIC, self.attention(tokens))
        self.report.add_images((positions_KI[:, 0] // length).tolist(), batch, kept_KI, scores_KI)
        if not self.sparsifier.drops_image_tokens(kept_KI.shape[1]):
            return None
        keep_BN = torch.ones(batch * length, dtype=torch.bool, device=hidden_BNC.device)
        keep_BN[positions_KI] = kept_KI
        return keep_BN.view(batch, length)

    def keep_prompt(self, hidden_BNC: Tensor, droppable_BN: Tensor) -> Tensor:
        """Decide on those prompt tokens that may be dropped; return a bool ``[B, N]``."""
        kept_BN = self.sparsifier.keep_prompt_tokens(hidden_BNC, ordinals(droppable_BN)) | ~droppable_BN
        self.report.add_prompt(kept_BN, droppable_BN)
        return kept_BN

    def question(self, valid_BN: Tensor) -> Tensor:
        """Return which tokens of a prompt, ``valid_BN``, may be dropped: bool ``[B, N]``."""
        given, marker = self.given, self.sparsifier.config.prompt_marker
        return question_mask(given.token_ids_BN, given.image_positions_KI, valid_BN, marker)


def keep_only(
    tokens: Tokens, valid_BN: Tensor, keeps: Sequence[Tensor | None]
) -> tuple[Tokens, Tensor, Tensor]:
    """Remove the tokens that one of ``keeps`` (bool ``[B, N]``; None keeps all) drops, and padding with them.

    Returns
    -------
    selected, index_BL, valid_BL
        What remains, aligned to the right, where it comes from, and which columns are no padding. Where
        nothing may be dropped, the tokens as they are.
    """
    batch, length = valid_BN.shape
    if all(keep_BN is None for keep_BN in keeps):
        every_BN = torch.arange(length, device=valid_BN.device).expand(batch, -1)
        return tokens, every_BN, valid_BN
    for keep_BN in keeps:
        valid_BN = valid_BN if keep_BN is None else valid_BN & keep_BN
    index_BL, valid_BL = right_align(valid_BN)
    positions = tokens.position_ids.expand(*tokens.position_ids.shape[:-2], batch, length)
    positions = positions.gather(-1, index_BL.expand(*positions.shape[:-1], -1))
    return Tokens(gather_tokens(tokens.hidden_BNC, index_BL), positions, None), index_BL, valid_BL
