"""The stock decoder in two halves, with the selection between them.

Legend: N tokens of the batch, M tokens that enter the upper half, C channels.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from vllm.compilation.backends import set_model_tag
from vllm.compilation.decorators import support_torch_compile
from vllm.forward_context import get_forward_context
from vllm.sequence import IntermediateTensors

from dynamic_llava.sparsifier import Sparsifier
from dynamic_llava.vllm.attention import deferred_groups, make_sparse, see_all, see_selected
from dynamic_llava.vllm.batch import Batch, Batches
from dynamic_llava.vllm.kept import Kept
from dynamic_llava.vllm.report import Report
from dynamic_llava.vllm.selection import Selecting, Selection


# vLLM finds compiled code on disk by the place of `forward` in its file and by the engine's config. So the
# halves cannot be one class: the upper one would be given the code of the lower one.
@support_torch_compile(dynamic_arg_dims={"positions": -1, "hidden": 0, "added": 0})
class Lower(nn.Module):
    """The layers < l, compiled on their own."""

    def __init__(self, *, vllm_config: Any, layers: nn.ModuleList, prefix: str = "") -> None:
        super().__init__()
        self.layers = layers

    def forward(
        self, positions: torch.Tensor, hidden: torch.Tensor, added: IntermediateTensors | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Run the layers, with what is added behind the first ones; what they return waits to be added up."""
        extra = [] if added is None else list(added.tensors.values())
        state: tuple[Any, Any] = (hidden, None)
        for number, layer in enumerate(self.layers):
            hidden, residual = layer(positions, *state)
            state = (hidden + extra[number] if number < len(extra) else hidden, residual)
        return state


@support_torch_compile(dynamic_arg_dims={"positions": -1, "hidden": 0, "residual": 0})
class Upper(nn.Module):
    """The layers >= l and the last norm, compiled on their own."""

    def __init__(self, *, vllm_config: Any, layers: nn.ModuleList, norm: nn.Module, prefix: str = "") -> None:
        super().__init__()
        self.layers, self.norm = layers, norm

    def forward(self, positions: torch.Tensor, hidden: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        """Run the layers on what :class:`Lower` returned."""
        state = (hidden, residual)
        for layer in self.layers:
            state = layer(positions, *state)
        return self.norm(*state)[0]


class SparseDecoder(nn.Module):
    """Runs all tokens through the layers < l, and the selected ones through the others.

    Parameters
    ----------
    decoder
        The stock decoder: its ``layers`` and ``norm`` are used, their parameters stay where they are.
    sparsifier
        Its predictors decide, from the layer that its config names.

    Attributes
    ----------
    batches
        Tells of the batch that runs; set by the model runner's side.
    report
        What the last pass left behind.
    kept
        Which tokens were kept of requests that ask.
    """

    batches: Batches

    def __init__(self, vllm_config: Any, decoder: Any, sparsifier: Sparsifier) -> None:
        super().__init__()
        split, layers = sparsifier.config.layer, decoder.layers
        for layer in layers[split:]:
            make_sparse(layer.self_attn.attn)
        self.names = [layer.self_attn.attn.layer_name for layer in layers[split:]]
        with set_model_tag("lower_half"):
            self.below = Lower(vllm_config=vllm_config, layers=layers[:split])
        with set_model_tag("upper_half"):
            self.above = Upper(vllm_config=vllm_config, layers=layers[split:], norm=decoder.norm)
        weight = next(layers[split].parameters())
        sparsifier.to(weight.device, vllm_config.model_config.dtype)
        # Both are there: only learned methods are served.
        self.image_predictor = cast(nn.Module, sparsifier.image_predictor)
        self.text_predictor = cast(nn.Module, sparsifier.text_predictor)
        self.selecting = Selecting(self.image_predictor, self.text_predictor)
        self.held = torch.zeros(
            vllm_config.scheduler_config.max_num_seqs, dtype=torch.int32, device=weight.device
        )
        self.report: Report | None = None
        self.kept = Kept()

    def forward(
        self, hidden_NC: Tensor, positions: Tensor, added: IntermediateTensors | None = None
    ) -> Tensor:
        """Return the last hidden states, ``[N, C]``; 0 where a token was dropped.

        Parameters
        ----------
        positions
            Of each token, or three of each.
        added
            What the model adds to the hidden states behind its first layers, in their order; all are dense.
        """
        lower_NC, residual_NC = self.below(positions, hidden_NC, added)
        selection = self._select(lower_NC + residual_NC)
        if selection is None:
            return self.above(positions, lower_NC, residual_NC)
        index_M = selection.index_M
        upper_MC = self.above(positions[..., index_M], lower_NC[index_M], residual_NC[index_M])
        return torch.zeros_like(lower_NC).index_copy_(0, index_M, upper_MC)

    def _select(self, entering_NC: Tensor) -> Selection | None:
        """Select, and let attention know; None where all tokens enter: in passes that only warm up."""
        context, self.report = get_forward_context(), None
        if not context.attn_metadata:
            return None
        groups = deferred_groups(context, self.names)
        batch = self.batches.now()
        if batch is None:
            see_all(context, groups)
            return None
        common = groups[0][0].common
        begin = common.query_start_loc_cpu
        selection = self.selecting(
            entering_NC, batch, common.query_start_loc, begin, common.max_seq_len, self.held
        )
        see_selected(context, groups, selection)
        self.report = report(batch, begin, selection)
        self.kept.note(batch, begin, selection.stays_N)
        return selection


def report(batch: Batch, begin: Tensor, selection: Selection) -> Report:
    """Return what the scheduler must know of a pass; its copy from the device is not waited for."""
    new = begin.diff().tolist()
    return Report(
        [request.name for request in batch.requests],
        [done + fed for done, fed in zip(batch.done, new, strict=True)],
        selection.held_R.to("cpu", non_blocking=True).numpy(),
    )
