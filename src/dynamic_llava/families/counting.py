"""How many tokens each picture has: the ways to know that families share.

Legend: B batch, N tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor


def is_chunk(encoded: Any) -> bool:
    """Return whether ``generate`` feeds a prompt in parts, and these features are those of one part."""
    return encoded is not None and encoded.last_hidden_state is None


def lengths(encoded: Any) -> list[int]:
    """Return the number of features of each picture that was encoded before."""
    return [len(features) for features in encoded.pooler_output]


def even_share(pictures: int, mask_BN: Tensor) -> list[int]:
    """Return an even share of all image tokens for each of so many pictures."""
    tokens = int(mask_BN.sum())
    if tokens == 0 or tokens % pictures:
        raise ValueError(
            f"the prompts hold {tokens} image tokens for {pictures} pictures: "
            "give each picture one image placeholder"
        )
    return [tokens // pictures] * pictures


def fixed(size: int, mask_BN: Tensor) -> list[int]:
    """Return ``size`` for each picture, where all have it; each row holds whole ones."""
    tokens_B: Sequence[int] = mask_BN.sum(-1).tolist()
    for tokens in tokens_B:
        if tokens % size:
            raise ValueError(
                f"a row holds {tokens} image tokens, and a picture has {size}: a placeholder is missing, or "
                "prefill_chunk_size parts a picture (choose a chunk that ends outside of pictures)"
            )
    return [size] * (sum(tokens_B) // size)


def runs(mask_BN: Tensor) -> list[int]:
    """Return the lengths of the runs of image tokens, where text stands between any two pictures."""
    padded = torch.nn.functional.pad(mask_BN, (1, 1)).int()
    step = padded.diff(dim=-1)
    starts, ends = (step == 1).nonzero(), (step == -1).nonzero()
    return (ends[:, 1] - starts[:, 1]).tolist()


def refuse_chunk() -> NoReturn:
    """Raise ``ValueError``: text parts the pictures of this model, so that a part of a prompt tells none."""
    raise ValueError(
        "prefill_chunk_size: this model has text between the lines or frames of a picture, so that a part of "
        "a prompt does not tell which tokens belong together; leave it out"
    )


def runs_of_chunk(mask_BN: Tensor) -> list[int]:
    """Return the runs of a part of a prompt.

    Raises
    ------
    ValueError
        If a run touches an end of the part: it may be a part of a picture.
    """
    if bool(mask_BN[:, [0, -1]].any()):
        raise ValueError(
            "prefill_chunk_size parts a picture: a chunk begins or ends with image tokens; choose one that "
            "has text at both ends, or leave it out"
        )
    return runs(mask_BN)
