"""What it costs to decide what stays: the FLOPs of the methods of a config."""

from __future__ import annotations

from dynamic_llava import methods
from dynamic_llava.config import SparsityConfig
from dynamic_llava.methods.top_k import keep_count


def image_decision_flops(config: SparsityConfig, hidden_size: int, tokens: int) -> float:
    """Return the FLOPs of scoring a picture of ``tokens`` image tokens; 0 where none of them goes."""
    if not config.sparsify_image or keep_count(tokens, config.image_keep_rate) == tokens:
        return 0.0
    return methods.image_method(config.image_policy, config.image_options).flops(config, hidden_size, tokens)


def text_decision_flops(config: SparsityConfig, hidden_size: int) -> float:
    """Return the FLOPs of the decision on one output token or prompt token."""
    return methods.output_method(config.text_policy, config.text_options).flops(config, hidden_size)


def output_decision_flops(config: SparsityConfig, hidden_size: int) -> float:
    """Return the FLOPs of the decision on one output token; 0 where none of them goes."""
    return text_decision_flops(config, hidden_size) if config.sparsify_text else 0.0
