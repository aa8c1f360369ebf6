"""What a stage of training minimises: a module whose forward is a whole step's loss.

All that a step computes happens in one forward, so that it may be wrapped by DDP, FSDP or DeepSpeed.

Legend: B rows, N tokens, A labelled tokens.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from dynamic_llava.data.training import IGNORE

Group = Mapping[str, Any]


class Objective(nn.Module, ABC):
    """A model and how it is trained.

    Parameters
    ----------
    model
        What is trained.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def begin_step(self, step: int, steps: int) -> None:
        """Follow the schedules of step ``step`` of ``steps``."""
        return

    def counts(self, groups: Sequence[Group]) -> Tensor:
        """Return by what the parts of a loss are divided, float32 [3]: label weights, pictures, rows."""
        weight = sum(label_weights(group).sum() for group in groups)
        pictures = sum(self.count_pictures(group) for group in groups)
        return torch.tensor([float(weight), pictures, sum(len(group["labels"]) for group in groups)])

    def count_pictures(self, group: Group) -> int:
        """Return how many pictures a group has that a loss counts."""
        return len(group.get("pixel_values", ()))

    @abstractmethod
    def forward(self, groups: Sequence[Group], totals: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss of one batch and sums for the log.

        Parameters
        ----------
        groups
            Rows of similar length each: what the model takes, ``labels`` and what else the stage needs.
        totals
            :meth:`counts` of all that shares this optimizer step, other processes included.
        """


def label_weights(group: Group) -> Tensor:
    """Return the loss weight of each labelled token after the first column, [A]; of each row in vision."""
    labels = group["labels"]
    if labels.ndim != 2:
        return torch.ones(len(labels))
    labelled_BN = labels[:, 1:] != IGNORE
    if "weights" not in group:
        return labelled_BN.sum()[None].float()
    return cast(Tensor, group["weights"][:, 1:][labelled_BN])
