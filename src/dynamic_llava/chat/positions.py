"""Whether a prompt and its answer fit into the positions that a model was made for."""

from __future__ import annotations

from typing import Any


def positions_of(config: Any) -> int | None:
    """Return how many positions the decoder of a model's config has; None where it sets no limit."""
    return getattr(config.get_text_config(), "max_position_embeddings", None)


def check_positions(
    positions: int | None, tokens: int, new_tokens: int = 0, name: str = "the prompt"
) -> None:
    """Refuse what is longer than the model's positions: behind them answers are garbage, after minutes.

    Parameters
    ----------
    positions
        See `positions_of`.
    tokens
        Length of the prompt, image tokens included.
    new_tokens
        Length of the longest answer.
    name
        What is asked, for the message.

    Raises
    ------
    ValueError
        Both together do not fit.
    """
    if positions is None or tokens + new_tokens <= positions:
        return
    length = f"{name}: {tokens:,} tokens, those of pictures included,"
    if tokens >= positions:
        raise ValueError(f"{length} are too many for the model's {positions:,} positions; shorten it")
    raise ValueError(
        f"{length} and an answer of {new_tokens:,} are too many for the model's {positions:,} positions; "
        f"shorten it, or ask for at most {positions - tokens:,} new tokens"
    )
