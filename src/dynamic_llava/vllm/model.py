"""What the model classes of all families have in common."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, ClassVar

from torch import Tensor, nn

from dynamic_llava.sparsifier import Sparsifier
from dynamic_llava.vllm.decoder import SparseDecoder
from dynamic_llava.vllm.rates import server_config
from dynamic_llava.vllm.settings import adapter_of

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
        self.sparse = SparseDecoder(vllm_config, self.language_model.model, sparsifier)

    def get_model_state_cls(self) -> type[Any]:
        """Return what Model Runner V2 keeps of its batches for us."""
        from dynamic_llava.vllm.state import SparseState

        return SparseState

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Load the stock model; the predictors have been, and their file lies beside."""
        stock = ((name, weight) for name, weight in weights if not name.startswith(PREDICTORS))
        loaded: set[str] = super().load_weights(stock)  # type: ignore[misc]
        return loaded | {name for name, _ in self.named_parameters() if name.startswith("sparse.")}
