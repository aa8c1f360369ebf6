"""The sizes of a decoder that set its cost.

Legend: N tokens, C hidden size, F feed-forward size, Q query width (heads x head size), G key width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class DecoderShape:
    """The sizes of a Llama-like decoder that set its cost; sliding windows count as full attention.

    Parameters
    ----------
    layers
        Number of decoder layers.
    hidden, intermediate
        C and F; with experts, F of all experts that a token goes through.
    query_width, key_width
        Q and G: heads times head size, of queries and of keys (or values).
    experts
        Experts that a router chooses from; 0 for none.
    windows
        Of each layer the tokens that its sliding window sees; None for full attention. Empty if all are full.
    """

    layers: int
    hidden: int
    intermediate: int
    query_width: int
    key_width: int
    experts: int = 0
    windows: tuple[int | None, ...] = ()

    @classmethod
    def from_config(cls, config: Any) -> DecoderShape:
        """Read the sizes of a transformers text config."""
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        experts = getattr(config, "num_experts", None) or 0
        intermediate: int = config.intermediate_size
        if experts:
            intermediate = config.num_experts_per_tok * config.moe_intermediate_size
        return cls(
            layers=config.num_hidden_layers,
            hidden=config.hidden_size,
            intermediate=intermediate,
            query_width=config.num_attention_heads * head_dim,
            key_width=config.num_key_value_heads * head_dim,
            experts=experts,
            windows=_windows(config),
        )

    @property
    def layer_weights(self) -> int:
        """Numbers in the matrices of one layer that a token meets (gated feed-forward, router)."""
        attention = 2 * self.hidden * (self.query_width + self.key_width)
        return attention + self.hidden * (3 * self.intermediate + self.experts)

    def layer_flops(self, queries: float, keys: float) -> float:
        """FLOPs of one layer (gated feed-forward) for queries that attend to ``keys``; no causal discount."""
        return 2 * queries * self.layer_weights + 4 * queries * keys * self.query_width

    def passes_flops(self, passes: int, first: float, step: float) -> float:
        """FLOPs of one layer in ``passes`` passes, over ``first``, ``first + step``, ... tokens."""
        mean = first + step * (passes - 1) / 2
        mean_square = mean**2 + step**2 * (passes**2 - 1) / 12
        return passes * self.layer_flops(mean, mean_square / mean)  # linear part ~ N, attention ~ N^2

    def kv_bytes_per_token(self, element_size: int) -> int:
        """Bytes of one token's key and value in one layer."""
        return 2 * self.key_width * element_size


def _windows(config: Any) -> tuple[int | None, ...]:
    """Return what each layer sees back, where any has a sliding window."""
    types, window = getattr(config, "layer_types", None), getattr(config, "sliding_window", None)
    if types is None:
        return (window,) * config.num_hidden_layers if window else ()
    windows = tuple(window if kind == "sliding_attention" else None for kind in types)
    return windows if any(windows) else ()
