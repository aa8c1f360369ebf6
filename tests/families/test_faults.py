"""A test of the matrix: each deliberate fault in the library must make one of its checks fail."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from tests.families import test_matrix as matrix
from torch import Tensor

from dynamic_llava.core import view
from dynamic_llava.core.decisions import Decisions
from dynamic_llava.core.passes import base as passes
from dynamic_llava.core.view import View
from dynamic_llava.families import qwen3_vl

Patch = pytest.MonkeyPatch


def compacted_positions(patch: Patch) -> None:
    """Positions and rotary tables of the first tokens, for those that are kept."""
    stock = view.gather_argument

    def compacted(value: Any, index_BL: Tensor, fed: int) -> Any:
        return stock(value, torch.arange(index_BL.shape[1]).expand_as(index_BL), fed)

    patch.setattr(view, "gather_argument", compacted)


def rate_of_a_row(patch: Patch) -> None:
    """All pictures of a call ranked together."""
    stock = Decisions.keep_image_tokens

    def together(self: Any, hidden_BNC: Tensor, pictures: Any, attention: Any) -> Any:
        (kept, scores), *_ = stock(self, hidden_BNC, [torch.cat(list(pictures))], attention)
        sizes = [len(picture_I) for picture_I in pictures]
        return list(zip(kept.split(sizes), [scores] * len(sizes), strict=True))

    patch.setattr(Decisions, "keep_image_tokens", together)


def causal_mask(patch: Patch) -> None:
    """A mask of our own in the sparse layers, instead of the stock one."""

    def without(self: View, mask: Any) -> Any:
        seen = self.valid_BS[:, None]
        if self.column_BL is not None:
            seen = seen & (self.column_BS[:, None] <= self.column_BL[..., None])
        return torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)[:, None]

    patch.setattr(View, "mask", without)


def lost_padding(patch: Patch) -> None:
    """Rows that keep fewer tokens see what fills them up."""
    stock = passes.right_align

    def filled(keep_BN: Tensor) -> tuple[Tensor, Tensor]:
        index_BL, valid_BL = stock(keep_BN)
        return index_BL, torch.ones_like(valid_BL)

    patch.setattr(passes, "right_align", filled)


def every_output_token(patch: Patch) -> None:
    """No output token goes, though the report says so."""
    from dynamic_llava.core.slots import Slots

    patch.setattr(Slots, "keep", lambda self, keep_B: self.extend(None))


def windows_by_slot(patch: Patch) -> None:
    """The columns of a sliding window are counted from the first."""
    patch.setattr(view, "first_column", lambda mask, past, fed, columns: 0)


FAULTS: dict[str, tuple[Callable[[Patch], None], str]] = {
    "compacted positions": (compacted_positions, "qwen2_5_vl"),
    "compacted positions, one axis": (compacted_positions, "llava"),
    "rate of a row": (rate_of_a_row, "llava_next"),
    "causal mask for two-way pictures": (causal_mask, "gemma3"),
    "causal mask for a window": (causal_mask, "mistral"),
    "lost padding": (lost_padding, "internvl"),
    "every output token": (every_output_token, "llama"),
    "windows by slot": (windows_by_slot, "gemma3"),
}


def fails(check: Callable[[], None]) -> bool:
    try:
        check()
    except (AssertionError, ValueError, RuntimeError, IndexError):
        return True
    return False


@pytest.fixture
def patched() -> Iterator[Patch]:
    with pytest.MonkeyPatch.context() as patch:
        yield patch


@pytest.mark.parametrize(("fault", "name"), FAULTS.values(), ids=FAULTS)
def test_the_matrix_sees_it(fault: Callable[[Patch], None], name: str, patched: Patch) -> None:
    def check() -> None:
        matrix.test_answers_are_those_of_closed_columns(name, {}, "eager")
        if name in matrix.WITH_PICTURES:
            matrix.test_rates_hold_for_each_picture(name)

    check()
    fault(patched)
    assert fails(check)


def test_the_matrix_sees_forgotten_deepstack(patched: Patch) -> None:
    """A sparse layer among those that get features of the tower: it has fewer tokens than they are for."""
    patched.setattr(matrix, "SPLIT", 1)

    def check() -> None:
        matrix.test_answers_are_those_of_closed_columns("qwen3_vl", {}, "eager")

    assert fails(check)
    patched.setattr(qwen3_vl.FAMILY.__class__, "first_layer", lambda self, config: 1, raising=False)
    assert fails(check)
