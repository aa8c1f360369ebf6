"""Records what flows through an attached model, by forward hooks; what it records is on the CPU.

Legend: B batch, K pictures, I image tokens, N tokens, L tokens in the sparse layers, C channels.
"""

from __future__ import annotations

from types import TracebackType
from typing import Any

from torch import Tensor, nn


class Probe:
    """While entered, records every call of the decoder and of the predictors.

    Parameters
    ----------
    model
        A stock model with its sparsifier attached.

    Attributes
    ----------
    features_KIC
        Image features after the projector, one tensor a call that encodes pictures.
    embeds_BNC, dense_positions_BN
        What enters layer 0, and its position ids.
    hidden_BLC, positions_BL, policy_BN
        What enters layer l, its position ids, and the weights of its keys (None outside of training).
    last_hidden_BLC
        What leaves the decoder's last norm.
    image_hidden_KIC, image_logits_KI2, text_logits_BN2, prompt_logits_BN2
        What enters the image predictor, and what the predictors return.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        self.features_KIC: list[Tensor] = []
        self.embeds_BNC: list[Tensor] = []
        self.dense_positions_BN: list[Tensor] = []
        self.hidden_BLC: list[Tensor] = []
        self.positions_BL: list[Tensor] = []
        self.policy_BN: list[Tensor | None] = []
        self.last_hidden_BLC: list[Tensor] = []
        self.image_hidden_KIC: list[Tensor] = []
        self.image_logits_KI2: list[Tensor] = []
        self.text_logits_BN2: list[Tensor] = []
        self.prompt_logits_BN2: list[Tensor] = []
        self._handles: list[Any] = []

    def __enter__(self) -> Probe:
        decoder, sparsifier = self.model.model.language_model, self.model.sparsifier
        first, split = decoder.layers[0], decoder.layers[sparsifier.config.layer]
        self._handles = [
            first.register_forward_pre_hook(self._enter_dense, with_kwargs=True),
            split.register_forward_pre_hook(self._enter_sparse, with_kwargs=True),
            self._output_of(self.model.model.multi_modal_projector, self.features_KIC),
            self._output_of(decoder.norm, self.last_hidden_BLC),
            sparsifier.image_predictor.register_forward_pre_hook(self._enter_image_predictor),
            self._output_of(sparsifier.image_predictor, self.image_logits_KI2),
            self._output_of(sparsifier.text_predictor, self.text_logits_BN2),
        ]
        if sparsifier.prompt_predictor is not None:
            self._handles.append(self._output_of(sparsifier.prompt_predictor, self.prompt_logits_BN2))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for handle in self._handles:
            handle.remove()

    def _output_of(self, module: nn.Module, records: list[Tensor]) -> Any:
        def record(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
            records.append(output.detach().cpu())

        return module.register_forward_hook(record)

    def _enter_dense(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.embeds_BNC.append(args[0].detach().cpu())
        self.dense_positions_BN.append(kwargs["position_ids"].cpu())

    def _enter_sparse(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        key_weights = kwargs.get("key_weights")
        self.hidden_BLC.append(args[0].detach().cpu())
        self.positions_BL.append(kwargs["position_ids"].cpu())
        self.policy_BN.append(None if key_weights is None else key_weights.policy_BN.detach().cpu())

    def _enter_image_predictor(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        self.image_hidden_KIC.append(args[0].detach().cpu())
