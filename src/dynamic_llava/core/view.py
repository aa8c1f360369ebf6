"""A sparse layer is a dense layer seen through an index: the stock arguments, gathered at the kept tokens.

Legend: B batch, N tokens fed, L tokens that enter the sparse layers (padded), M columns of a stock mask,
S slots, C channels.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from dynamic_llava.core.blocks import block_mask

MASK = "attention_mask"


def right_align(keep_BN: Tensor) -> tuple[Tensor, Tensor]:
    """Return where the kept tokens of each row lie, aligned to the right.

    Parameters
    ----------
    keep_BN
        Bool; the rows may keep different numbers of tokens.

    Returns
    -------
    index_BL, valid_BL
        Source position of each kept token in its original order (int64), and which of these columns are
        tokens and not padding (bool). L is the longest row's count.
    """
    length = int(keep_BN.sum(-1).max())
    order_BN = keep_BN.to(torch.uint8).argsort(dim=-1, stable=True)
    index_BL = order_BN[:, order_BN.shape[1] - length :]
    return index_BL, keep_BN.gather(1, index_BL)


def gather_tokens(x: Tensor, index_BL: Tensor, axis: int = 1) -> Tensor:
    """Return ``x`` at ``index_BL`` along its token axis; the axis before is that of rows, B or 1 long."""
    index_BL = index_BL.to(x.device)  # a device_map may part the layers
    x = x.expand(*x.shape[: axis - 1], len(index_BL), *x.shape[axis:])
    index = index_BL.view(*[1] * (axis - 1), *index_BL.shape, *[1] * (x.ndim - axis - 1))
    return x.gather(axis, index.expand(*x.shape[:axis], -1, *x.shape[axis + 1 :]))


def gather_argument(value: Any, index_BL: Tensor, fed: int) -> Any:
    """Return an argument of a layer at ``index_BL``, where it has ``fed`` tokens; others as they are.

    Integers such as position ids have their tokens in the last axis, numbers such as rotary tables in the
    last but one; tuples, lists and dicts are entered.
    """
    if isinstance(value, Tensor):
        axis = value.ndim - (2 if value.is_floating_point() else 1)
        return gather_tokens(value, index_BL, axis) if axis > 0 and value.shape[axis] == fed else value
    if isinstance(value, tuple | list):
        return type(value)(gather_argument(part, index_BL, fed) for part in value)
    if isinstance(value, dict):
        return {name: gather_argument(part, index_BL, fed) for name, part in value.items()}
    return value


def first_column(mask: Any, past: Any, fed: int, columns: int | None) -> Any:
    """Return which column a stock mask begins with: those of sliding windows end at the newest.

    A mask of all ``columns`` of a static cache begins with the first; no tensor needs to tell it.
    """
    if mask.shape[-1] == columns:
        return 0
    first = past + fed - mask.shape[-1]
    return first.clamp(min=0) if isinstance(first, Tensor) else max(first, 0)


@dataclass(eq=False)
class View:
    """What the layers >= l see of one call.

    Parameters
    ----------
    fed, past
        New tokens N of each row, and the columns fed before them: a tensor in a static cache.
    column_BS, valid_BS
        The column of each slot of the keys, int64, and which slots hold a token.
    column_BL
        The column of each query; None for a decoded token, which sees every valid slot.
    index_BL
        Which of the new tokens enter; None where all do, as they are.
    sees_all
        Whether plain causal attention over the slots, or one query that sees them all, is right.
    is_flash
        Whether masks are 2-D, over the keys alone.
    columns
        How many columns a static cache has in all; None for one that grows.
    """

    fed: int
    past: Any
    column_BS: Tensor
    valid_BS: Tensor
    column_BL: Tensor | None = None
    index_BL: Tensor | None = None
    sees_all: bool = False
    is_flash: bool = False
    columns: int | None = None
    _masks: list[tuple[Any, Any]] = field(default_factory=list)  # what was made: layers share arguments
    _gathered: list[tuple[Any, Any]] = field(default_factory=list)

    def arguments(
        self, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return the arguments of a stock layer as a sparse layer gets them; the first one is ready."""
        if self.index_BL is not None:
            args = (*args[:1], *(self._gather(value) for value in args[1:]))
            kwargs = {name: value if name == MASK else self._gather(value) for name, value in kwargs.items()}
        if MASK in kwargs:
            kwargs[MASK] = self.mask(kwargs[MASK])
        return args, kwargs

    def mask(self, mask: Any) -> Any:
        """Return who sees whom among the slots, in the form of the stock mask, which has the columns."""
        for seen, made in self._masks:
            if seen is mask:
                return made
        made = self._without_mask() if mask is None else self._from_mask(mask)
        self._masks.append((mask, made))
        return made

    def _gather(self, value: Any) -> Any:
        if self.index_BL is None or not isinstance(value, Tensor | tuple | list | dict):
            return value
        for seen, made in self._gathered:
            if seen is value:
                return made
        made = gather_argument(value, self.index_BL, self.fed)
        self._gathered.append((value, made))
        return made

    def _without_mask(self) -> Tensor | None:
        # Positions with gaps look like packed rows to flash attention, unless a mask is there.
        if self.sees_all and not (self.is_flash and self.index_BL is not None):
            return None
        if self.is_flash:
            return self.valid_BS.long()
        if self.column_BL is None:
            return self.valid_BS[:, None, None]
        return (self.valid_BS[:, None] & (self.column_BS[:, None] <= self.column_BL[..., None]))[:, None]

    def _from_mask(self, mask: Any) -> Any:
        column_BS, valid_BS = self.column_BS, self.valid_BS
        first = first_column(mask, self.past, self.fed, self.columns)
        if isinstance(first, Tensor) or first:
            column_BS = column_BS - first
            valid_BS = valid_BS & (column_BS >= 0)
            column_BS = column_BS.clamp(min=0)
        if isinstance(mask, BlockMask):
            return block_mask(mask, self.index_BL, self.fed, column_BS, valid_BS)
        column_BS, valid_BS = column_BS.to(mask.device), valid_BS.to(mask.device)
        if mask.ndim == 2:
            return mask.expand(len(column_BS), -1).gather(1, column_BS) * valid_BS
        mask_BHLM = mask.expand(len(column_BS), -1, -1, -1)
        if self.index_BL is not None:
            mask_BHLM = gather_tokens(mask_BHLM.transpose(1, 2), self.index_BL).transpose(1, 2)
        _, heads, queries, _ = mask_BHLM.shape
        mask_BHLS = mask_BHLM.gather(3, column_BS[:, None, None].expand(-1, heads, queries, -1))
        if mask.dtype == torch.bool:
            return mask_BHLS & valid_BS[:, None, None]
        return mask_BHLS.masked_fill(~valid_BS[:, None, None], torch.finfo(mask.dtype).min)
