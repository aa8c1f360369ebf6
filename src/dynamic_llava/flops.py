"""What a decoder costs: floating-point operations and K/V bytes, dense and sparse.

Legend: N tokens, C hidden size, F feed-forward size, Q query width (heads x head size), G key width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from dynamic_llava.config import SparsityConfig


@dataclass(frozen=True)
class DecoderShape:
    """The sizes of a Llama-like decoder that set its cost.

    Parameters
    ----------
    layers
        Number of decoder layers.
    hidden, intermediate
        C and F.
    query_width, key_width
        Q and G: heads times head size, of queries and of keys (or values).
    """

    layers: int
    hidden: int
    intermediate: int
    query_width: int
    key_width: int

    @classmethod
    def from_config(cls, config: Any) -> DecoderShape:
        """Read the sizes of a transformers text config."""
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        return cls(
            layers=config.num_hidden_layers,
            hidden=config.hidden_size,
            intermediate=config.intermediate_size,
            query_width=config.num_attention_heads * head_dim,
            key_width=config.num_key_value_heads * head_dim,
        )

    def layer_flops(self, queries: float, keys: float) -> float:
        """FLOPs of one layer (gated feed-forward) for queries that attend to ``keys``; no causal discount."""
        linear = 2 * self.hidden * (self.query_width + self.key_width) + 3 * self.hidden * self.intermediate
        return 2 * queries * linear + 4 * queries * keys * self.query_width

    def kv_bytes_per_token(self, element_size: int) -> int:
        """Bytes of one token's key and value in one layer."""
        return 2 * self.key_width * element_size


def prefill_flops(shape: DecoderShape, tokens: float, kept: float, layer: int) -> float:
    """FLOPs of a prefill of which ``kept`` tokens enter the layers >= ``layer``, without predictors."""
    dense = layer * shape.layer_flops(tokens, tokens)
    return dense + (shape.layers - layer) * shape.layer_flops(kept, kept)


def paper_flops(shape: DecoderShape, image_tokens: int, kept: int, layer: int) -> int:
    """FLOPs as the paper counts: ``32 N C^2 + 4 N^2 C`` a layer, over image tokens only.

    With 576 image tokens it gives the paper's 10.1 TFLOPs for LLaVA-1.5-7B and 2.49 where 115 are kept.
    """

    def one_layer(tokens: int) -> int:
        return 32 * tokens * shape.hidden**2 + 4 * tokens**2 * shape.hidden

    return layer * one_layer(image_tokens) + (shape.layers - layer) * one_layer(kept)


def image_predictor_flops(config: SparsityConfig, hidden: int, tokens: float) -> float:
    """FLOPs of scoring the ``tokens`` image tokens of one picture."""
    width = config.d_model
    block = 2 * tokens * (4 * width**2 + 2 * width * config.dim_feedforward) + 4 * tokens**2 * width
    return 2 * tokens * (hidden * width + _head(width)) + config.num_layers * block


def text_predictor_flops(config: SparsityConfig, hidden: int) -> float:
    """FLOPs of the decision on one output token."""
    return 2 * (hidden * config.d_model + _head(config.d_model))


def _head(width: int) -> float:
    """Multiplications of the MLP that ends in two logits."""
    return width * width / 2 + width * width / 8 + width / 2
