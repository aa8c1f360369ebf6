"""Which tokens of a batch enter the layers >= l, and in which slots their K/V lies.

Legend: N tokens of the batch, M tokens that enter, R requests (rows), K pictures, I image tokens, C channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dynamic_llava.methods.top_k import keep_count, top_k_mask
from dynamic_llava.vllm.batch import Batch


@dataclass(frozen=True)
class Selection:
    """The tokens that enter, and what attention must know of them.

    Attributes
    ----------
    index_M
        Which tokens of the batch they are, ascending.
    row_M
        The row of each.
    slot_M
        The place of each in its request's own sequence of held tokens.
    begin_S, begin
        Where each row begins among them, one more at the end: int32 ``[R + 1]``, on the device and here.
    length_R
        Slots that each row attends to.
    longest, longest_row
        The most slots, and the most entering tokens, of a row; at least.
    held_R
        Slots of each row that stay held after the pass.
    stays_N
        Which tokens of the batch they are.
    """

    index_M: Tensor
    row_M: Tensor
    slot_M: Tensor
    begin_S: Tensor
    begin: Tensor
    length_R: Tensor
    longest: int
    longest_row: int
    held_R: Tensor
    stays_N: Tensor


class Selecting:
    """Decides by the predictors.

    Parameters
    ----------
    image_predictor, text_predictor
        The networks that return keep/drop logits.
    """

    def __init__(self, image_predictor: nn.Module, text_predictor: nn.Module) -> None:
        self.image_predictor = image_predictor
        self.text_predictor = text_predictor

    def __call__(
        self, hidden_NC: Tensor, batch: Batch, begin_S: Tensor, begin: Tensor, longest: int, held: Tensor
    ) -> Selection:
        """Select, and write down what is held then.

        Parameters
        ----------
        hidden_NC
            What enters layer l.
        batch
            The requests.
        begin_S, begin
            Where each row begins among the ``N`` tokens: int32 ``[R + 1]``, on the device and here.
        longest
            The most tokens of a row, computed ones included.
        held
            Slots held by each request, int32, by ``batch.index_R``; changed in place.
        """
        starts = begin.tolist()
        stays_N = self._stays(hidden_NC, batch, starts)
        before_R = self._before(batch, held)
        if (
            len(starts) - 1 == starts[-1]
        ):  # a token a row: all of them enter, and nothing is asked of the device
            index_M = torch.arange(starts[-1], device=hidden_NC.device)
            row_M, length_R, held_R = index_M, before_R + 1, before_R + stays_N[: starts[-1]].int()
            selection = Selection(
                index_M, row_M, before_R.long(), begin_S, begin, length_R, longest, 1, held_R, stays_N
            )
        else:
            selection = _compacted(stays_N, begin_S, starts, before_R)
        held[batch.index_R] = selection.held_R
        return selection

    def _stays(self, hidden_NC: Tensor, batch: Batch, starts: Sequence[int]) -> Tensor:
        """Return which tokens stay, bool ``[N]``."""
        stays_N = torch.ones(len(hidden_NC), dtype=torch.bool, device=hidden_NC.device)
        for (count, kept), firsts in _pictures(batch, starts).items():
            at_KI = torch.tensor(firsts)[:, None] + torch.arange(count)
            at_KI = at_KI.to(hidden_NC.device, non_blocking=True)
            keep_KI, drop_KI = self.image_predictor(hidden_NC[at_KI]).float().unbind(-1)
            stays_N[at_KI] = top_k_mask(F.logsigmoid(keep_KI - drop_KI), kept)
        at, thresholds = _outputs(batch, starts)
        if at:
            at_T = torch.tensor(at).to(hidden_NC.device, non_blocking=True)
            threshold_T = torch.tensor(thresholds).to(hidden_NC.device, non_blocking=True)
            keep_T, drop_T = self.text_predictor(hidden_NC[at_T]).unbind(-1)
            stays_N[at_T] = keep_T > drop_T + threshold_T.to(drop_T.dtype)
        return stays_N

    @staticmethod
    def _before(batch: Batch, held: Tensor) -> Tensor:
        """Return how many slots each row held before the pass, int32 ``[R]``; none where it begins."""
        goes_on_R = torch.tensor([done > 0 for done in batch.done]).to(held.device, non_blocking=True)
        return held[batch.index_R] * goes_on_R


def _compacted(stays_N: Tensor, begin_S: Tensor, starts: Sequence[int], before_R: Tensor) -> Selection:
    """Select the tokens that stay, and the last one of each row: it has to say what comes next."""
    enters_N = stays_N.clone()
    enters_N[starts[-1] :] = False  # padding
    enters_N[begin_S[1:].long() - 1] = True
    index_M = enters_N.nonzero()[:, 0]
    # Counts of the tokens before each one of the batch, so that a row's count is a difference.
    entering_S, staying_S = (
        F.pad(mask_N.int().cumsum(0), (1, 0))[begin_S.long()] for mask_N in (enters_N, stays_N)
    )
    length_R = before_R + entering_S.diff()
    row_M = torch.bucketize(index_M, begin_S[1:].long(), right=True)
    slot_M = (
        before_R.long()[row_M] + torch.arange(len(index_M), device=index_M.device) - entering_S.long()[row_M]
    )
    begin = entering_S.int().cpu()
    return Selection(
        index_M, row_M, slot_M, entering_S.int(), begin, length_R.int(), int(length_R.max()),
        int(begin.diff().max()), (before_R + staying_S.diff()).int(), stays_N,
    )  # fmt: skip


def _pictures(batch: Batch, starts: Sequence[int]) -> dict[tuple[int, int], list[int]]:
    """Return where pictures begin in a batch, by how many tokens they have and keep.

    Raises
    ------
    RuntimeError
        A picture lies in the batch in part only: the scheduler is not ours.
    """
    found: dict[tuple[int, int], list[int]] = {}
    for request, done, start, end in zip(batch.requests, batch.done, starts, starts[1:], strict=False):
        for first, count in request.pictures:
            begins, ends = first - done, first + count - done  # among the row's tokens of this pass
            if begins >= 0 and ends <= end - start:
                kept = keep_count(count, request.rates.image)
                if kept < count:
                    found.setdefault((count, kept), []).append(start + begins)
            elif begins < end - start and ends > 0:
                raise RuntimeError("a picture was split over two chunks")
    return found


def _outputs(batch: Batch, starts: Sequence[int]) -> tuple[list[int], list[float]]:
    """Return which tokens of a batch are output tokens that may be dropped, and the threshold of each."""
    at: list[int] = []
    thresholds: list[float] = []
    for request, done, start, end in zip(batch.requests, batch.done, starts, starts[1:], strict=False):
        if request.rates.threshold > -torch.inf:
            outputs = range(start + max(request.prompt - done, 0), end)
            at += outputs
            thresholds += [request.rates.threshold] * len(outputs)
    return at, thresholds
