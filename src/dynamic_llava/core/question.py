"""Dropping tokens of a prompt's last question: which may go, and which do.

Legend: B batch, N tokens, K pictures, I image tokens, C channels.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dynamic_llava.core.decisions import Decisions
from dynamic_llava.core.record import Record
from dynamic_llava.core.spans import ordinals


def keep_question(decisions: Decisions, record: Record, hidden_BNC: Tensor, droppable_BN: Tensor) -> Tensor:
    """Decide on those prompt tokens that may be dropped; return a bool ``[B, N]``."""
    asked = decisions.questions(hidden_BNC, ordinals(droppable_BN))
    kept_BN = decisions.text_method.keep(asked) | ~droppable_BN
    record.add_prompt(kept_BN, droppable_BN)
    return kept_BN


def of_a_turn(
    token_ids_BN: Tensor | None, pictures: Sequence[Tensor], valid_BN: Tensor, marker: tuple[int, ...]
) -> Tensor:
    """Return which tokens of a new turn may be dropped: in rows without a picture all but the last.

    What it is given is that of :func:`question_mask`.
    """
    batch, length = valid_BN.shape
    rows = {int(picture_I[0]) // length for picture_I in pictures}
    has_picture_B = torch.tensor([row in rows for row in range(batch)], device=valid_BN.device)
    question_BN = question_mask(token_ids_BN, pictures, valid_BN, marker)
    return torch.where(has_picture_B[:, None], question_BN, but_last(valid_BN, valid_BN))


def question_mask(
    token_ids_BN: Tensor | None, pictures: Sequence[Tensor], valid_BN: Tensor, marker: tuple[int, ...]
) -> Tensor:
    """Find the prompt tokens that may be dropped: the last question, all but its last token.

    It starts with the last ``marker`` after the row's pictures, or right after them where there is none (the
    official ``last_instruct`` span); a row without pictures has none.

    Parameters
    ----------
    token_ids_BN
        None where the prompt was given as embeddings: then no marker is looked for.
    pictures
        Where the tokens of each picture lie in the flattened ``[B * N]`` input, int64 ``[I]`` each.
    valid_BN
        Which tokens belong to the prompt: no padding, no answer.
    marker
        Token ids; may be empty.

    Returns
    -------
    Tensor
        Bool ``[B, N]``.
    """
    batch, length = valid_BN.shape
    column_N = torch.arange(length, device=valid_BN.device)
    if not pictures:
        return torch.zeros_like(valid_BN)
    last_K = torch.stack([picture_I[-1] for picture_I in pictures])
    row_K, column_K = last_K // length, last_K % length
    start_B = torch.full((batch,), length, device=valid_BN.device)
    start_B = start_B.scatter_reduce(0, row_K, column_K + 1, "amax", include_self=False)
    if token_ids_BN is not None and 0 < len(marker) <= length:
        wanted = torch.tensor(marker, device=valid_BN.device)
        found_BM = (token_ids_BN.unfold(1, len(marker), 1) == wanted).all(-1)
        found_BM &= valid_BN.unfold(1, len(marker), 1).all(-1)
        found_BM &= column_N[: found_BM.shape[1]] >= start_B[:, None]
        last_B = torch.where(found_BM, column_N[: found_BM.shape[1]], -1).amax(-1)
        start_B = torch.where(last_B >= 0, last_B, start_B)
    return but_last(valid_BN & (column_N >= start_B[:, None]), valid_BN)


def but_last(mask_BN: Tensor, valid_BN: Tensor) -> Tensor:
    """Take the last token of each row out of a mask."""
    column_N = torch.arange(valid_BN.shape[1], device=valid_BN.device)
    last_B1 = torch.where(valid_BN, column_N, -1).amax(-1, keepdim=True)
    return mask_BN & (column_N != last_B1)
