"""What the model classes of all families have in common."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, ClassVar

from torch import Tensor, nn
from vllm.model_executor.models.utils import WeightsMapper

from dynamic_llava.families import family_of_type
from dynamic_llava.sparsifier import Sparsifier
from dynamic_llava.vllm.decoder import SparseDecoder
from dynamic_llava.vllm.rates import server_config
from dynamic_llava.vllm.settings import adapter_of

TOWER_PARTS = ("embeddings", "encoder", "pre_layrnorm", "post_layernorm", "head")
TOWER_NAMES = WeightsMapper(
    orig_to_new_prefix={f"vision_tower.{part}": f"vision_tower.vision_model.{part}" for part in TOWER_PARTS}
)
"""vLLM knows the names that transformers gave a CLIP or SigLIP tower before its version 5."""

PREDICTORS = ("image_predictor.", "text_predictor.", "prompt_predictor.")


class SparseModel(nn.Module):
    """A mixin before a model class of vLLM; where a checkpoint has no sparsifier, the stock model is made.

    Attributes
    ----------
    stock
        That class.
    """

    stock: ClassVar[type[nn.Module]]
    language_model: Any

    def __new__(cls, *, vllm_config: Any, prefix: str = "") -> Any:
        """Make the stock model where there is no sparsifier."""
        if adapter_of(vllm_config.model_config.model) is None:
            return cls.stock(vllm_config=vllm_config, prefix=prefix)
        return super().__new__(cls)

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        sparsifier = Sparsifier.from_pretrained(vllm_config.model_config.model).eval()
        self.sparsity = server_config(sparsifier.config, vllm_config.additional_config)
        config, decoder = vllm_config.model_config.hf_config, self.language_model.model
        family_of_type(config.model_type).check_layer(config, sparsifier.config.layer, len(decoder.layers))
        self.sparse = SparseDecoder(vllm_config, decoder, sparsifier)

    def forward(
        self,
        input_ids: Tensor | None,
        positions: Tensor,
        intermediate_tensors: Any = None,
        inputs_embeds: Tensor | None = None,
        **kwargs: object,
    ) -> Tensor:
        """Return the last hidden states, ``[N, C]``."""
        if inputs_embeds is None:
            inputs_embeds = self.language_model.model.embed_input_ids(input_ids)
        hidden_NC: Tensor = self.sparse(inputs_embeds, positions)
        return hidden_NC

    def get_model_state_cls(self) -> type[Any]:
        """Return what Model Runner V2 keeps of its batches for us."""
        from dynamic_llava.vllm.state import SparseState

        return SparseState

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Load the stock model; the predictors have been, and their file lies beside."""
        stock = ((name, weight) for name, weight in weights if not name.startswith(PREDICTORS))
        loaded: set[str] = super().load_weights(stock)  # type: ignore[misc]
        return loaded | {name for name, _ in self.named_parameters() if name.startswith("sparse.")}
