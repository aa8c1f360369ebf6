"""What a call brings with it, and what the four passes share.

Legend: B batch, K pictures, I image tokens, N tokens fed, L tokens kept, S slots, C channels.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dynamic_llava.core.attention.probe import Probe
from dynamic_llava.core.decisions import Decisions
from dynamic_llava.core.masks import is_token
from dynamic_llava.core.ranking import Ranking
from dynamic_llava.core.record import Record
from dynamic_llava.core.view import View, gather_tokens, right_align


@dataclass(frozen=True)
class PromptState:
    """What a run without a cache must remember; ``generate()`` hands it back in the place of a cache."""

    length: int
    record: Record

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Do nothing: there are no keys, and all rows share the prompt's length."""


@dataclass
class Given:
    """What a call brings: only the multimodal model sees all of it, so it travels to the decoder's layers.

    Parameters
    ----------
    pictures
        Where the tokens of each picture lie in the flattened ``[B * N]`` input, int64 ``[I]`` each.
    token_ids_BN
        None where embeddings were given.
    attention_mask
        As it was given.
    answer_mask_BN, prompt_mask_BN
        Droppable output tokens and prompt tokens, bool; the first asks for a masked pass.
    prompt
        That of an earlier step without a cache, or None.
    """

    pictures: Sequence[Tensor] = ()
    token_ids_BN: Tensor | None = None
    attention_mask: Any = None
    answer_mask_BN: Tensor | None = None
    prompt_mask_BN: Tensor | None = None
    prompt: PromptState | None = None


class Pass(ABC):
    """One way to run the decoder: what its layers >= l see.

    Parameters
    ----------
    decisions
        Makes the decisions.
    record
        Where they are written down.
    given
        What the call brings.
    is_flash
        Whether masks are 2-D, over the keys alone.

    Attributes
    ----------
    view
        What the layers >= l see, after :meth:`select`.
    """

    view: View

    def __init__(self, decisions: Decisions, record: Record, given: Given, is_flash: bool) -> None:
        self.decisions = decisions
        self.record = record
        self.given = given
        self.is_flash = is_flash
        self.past: Any = 0
        self.ranking: Ranking | None = None

    def begin(self, batch: int, length: int) -> None:
        """Begin a pass of ``length`` tokens a row, before any layer runs."""
        return

    @abstractmethod
    def prompt(self, mask: Any, batch: int, length: int, device: torch.device) -> Tensor:
        """Return which of the tokens fed belong to the prompt: bool ``[B, N]``."""

    @abstractmethod
    def select(self, hidden_BNC: Tensor, mask: Any) -> Tensor:
        """Decide at layer l, given what enters it and its stock mask; return what enters it then."""

    def close(self) -> PromptState | None:
        """End the pass; return what the caller gets in the place of a cache, where there is none."""
        self.record.end_pass()
        return None

    @property
    def needs_ranking(self) -> bool:
        """Whether the last dense layer is to be looked at."""
        return bool(self.given.pictures) and self.decisions.reads_attention

    @property
    def needs_attention(self) -> bool:
        """Whether it asks more of the attention of the layers than the stock function gives."""
        return self.needs_ranking

    def look(self, hidden_BNC: Tensor, mask: Any) -> Probe:
        """Have the last dense layer looked at, of which these are hidden states and stock mask."""
        batch, length, _ = hidden_BNC.shape
        prompt_BN = self.prompt(mask, batch, length, hidden_BNC.device)
        self.ranking = Ranking(mask, prompt_BN, int(self.past), self.given.pictures)
        return self.ranking.probe

    @property
    def attention(self) -> list[Tensor]:
        """The attention paid to the tokens of each picture, ``[I]``; nothing where nobody looked."""
        return [] if self.ranking is None else self.ranking.of_pictures()

    def arguments(
        self, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return the arguments of a stock layer as a sparse layer gets them."""
        return self.view.arguments(args, kwargs)

    def keep_images(self, hidden_BNC: Tensor) -> Tensor | None:
        """Decide on the image tokens; return a bool ``[B, N]``, or None where nothing is dropped."""
        pictures, (batch, length, _) = self.given.pictures, hidden_BNC.shape
        if not pictures:
            return None
        decided = self.decisions.keep_image_tokens(hidden_BNC, pictures, self.attention)
        rows_K = (torch.stack([picture_I[0] for picture_I in pictures]) // length).tolist()
        self.record.add_images(rows_K, batch, decided)
        if all(scores_I is None for _, scores_I in decided):
            return None
        keep = torch.ones(batch * length, dtype=torch.bool, device=hidden_BNC.device)
        keep[torch.cat(list(pictures))] = torch.cat([kept_I for kept_I, _ in decided])
        return keep.view(batch, length)

    def valid(self, mask: Any, batch: int, length: int, device: torch.device) -> Tensor:
        """Return which of the tokens fed are no padding, by the stock mask: bool ``[B, N]``."""
        valid_BN = None if mask is None else is_token(mask, batch, length, int(self.past), device)
        return torch.ones(batch, length, dtype=torch.bool, device=device) if valid_BN is None else valid_BN


@dataclass(frozen=True)
class Entering:
    """The tokens that enter layer l, aligned to the right.

    ``index_BL`` says where they come from, None where all do as they are; ``valid_BL`` which are no padding.
    """

    index_BL: Tensor | None
    valid_BL: Tensor

    @classmethod
    def of(cls, valid_BN: Tensor, keeps: Sequence[Tensor | None]) -> Entering:
        """Leave out what one of ``keeps`` (bool ``[B, N]``; None keeps all) drops, and padding with it."""
        if all(keep_BN is None for keep_BN in keeps):
            return cls(None, valid_BN)
        for keep_BN in keeps:
            valid_BN = valid_BN if keep_BN is None else valid_BN & keep_BN
        return cls(*right_align(valid_BN))

    @property
    def padded_BL(self) -> Tensor | None:
        """Which are no padding; None where none is."""
        return None if bool(self.valid_BL.all()) else self.valid_BL

    def gather(self, x_BNC: Tensor) -> Tensor:
        """Return them of ``x_BNC``."""
        return x_BNC if self.index_BL is None else gather_tokens(x_BNC, self.index_BL)

    def columns(self, length: int, past: int) -> Tensor:
        """Return where they stood in all that was fed, int64 ``[B, L]``."""
        if self.index_BL is not None:
            return self.index_BL + past
        batch = len(self.valid_BL)
        return torch.arange(past, past + length, device=self.valid_BL.device).expand(batch, -1)
