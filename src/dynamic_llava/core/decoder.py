"""The pass of an attached decoder: dense layers, select, sparse layers, norm.

One function owns this loop for every decoder with ``layers``, ``norm`` and ``rotary_emb``; its layers stay
stock. What differs by mode is how tokens are selected: see :mod:`dynamic_llava.core.passes`.

Legend: B batch, K pictures, I image tokens, N tokens fed, L tokens in the sparse layers, C channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from transformers import Cache, DynamicCache, StaticCache
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from dynamic_llava.core import masks
from dynamic_llava.core.cache import SparseCache
from dynamic_llava.core.passes import CachedPass, Inputs, MaskedPass, Pass, PromptState, RecomputePass, Tokens

if TYPE_CHECKING:
    from dynamic_llava.sparsifier import Sparsifier


@merge_with_config_defaults  # type: ignore[untyped-decorator]
@capture_outputs  # type: ignore[untyped-decorator]
def sparse_forward(
    language_model: Any,
    input_ids: Tensor | None = None,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    past_key_values: Cache | PromptState | None = None,
    inputs_embeds: Tensor | None = None,
    use_cache: bool | None = None,
    *,
    sparsifier: Sparsifier,
    image_positions_KI: Tensor | None = None,
    token_ids_BN: Tensor | None = None,
    answer_mask: Tensor | None = None,
    prompt_mask: Tensor | None = None,
    **kwargs: Any,
) -> BaseModelOutputWithPast:
    """Run the decoder with the decisions of ``sparsifier``, in place of the stock ``forward``.

    Parameters
    ----------
    language_model
        The stock decoder.
    image_positions_KI, token_ids_BN
        See :class:`Pass`; the sparsifier's hook on the multimodal model finds them.
    answer_mask, prompt_mask
        Bool ``[B, N]``, droppable output tokens and prompt tokens: the first asks for a masked pass at full
        length, the second is needed then if ``sparsify_prompt`` is on.
    **kwargs
        Go to the layers.
    """
    if (input_ids is None) == (inputs_embeds is None):
        raise ValueError("pass exactly one of input_ids and inputs_embeds")
    if inputs_embeds is None:
        inputs_embeds = language_model.embed_tokens(input_ids)
    sparsifier.check()
    given = Inputs(image_positions_KI, token_ids_BN, attention_mask)
    if answer_mask is not None:
        if isinstance(past_key_values, Cache) and past_key_values.get_seq_length() > 0:
            raise ValueError(
                "answer_mask asks for a pass at full length: give all tokens and no past_key_values"
            )
        mode: Pass = MaskedPass(sparsifier, sparsifier.new_report(), given, answer_mask, prompt_mask)
    elif use_cache:
        mode = CachedPass(sparsifier, given, _sparse_cache(sparsifier, past_key_values))
    else:
        mode = RecomputePass(sparsifier, given, _prompt_state(sparsifier, past_key_values, inputs_embeds))
    sparsifier.report = mode.report
    if position_ids is None:
        past = mode.cache.get_seq_length() if mode.cache is not None else 0
        position_ids = torch.arange(inputs_embeds.shape[1], device=inputs_embeds.device)[None] + past

    layers, split = language_model.layers, sparsifier.config.layer
    visible = mode.open(inputs_embeds)
    tokens = Tokens(inputs_embeds, position_ids, visible, probe=mode.probe(inputs_embeds, visible))
    tokens.hidden_BNC = _run(language_model, layers[:split], tokens, mode.cache, kwargs)
    tokens = mode.select(tokens)
    hidden_BLC = _run(language_model, layers[split:], tokens, mode.cache, kwargs)
    return BaseModelOutputWithPast(
        last_hidden_state=language_model.norm(hidden_BLC), past_key_values=mode.close()
    )


def _sparse_cache(sparsifier: Sparsifier, past: Any) -> SparseCache:
    """Return the cache of this call: the one handed in, or a new one in place of an empty default."""
    if isinstance(past, SparseCache):
        sparsifier.check_cache(past)
        return past
    if past is None or (type(past) is DynamicCache and past.get_seq_length() == 0 and not past.offloading):
        return sparsifier.new_cache()
    if type(past) is StaticCache and past.get_seq_length() == 0:  # generate(cache_implementation="static")
        return sparsifier.new_cache(cast(Any, past).layers[0].max_cache_len, static=True)
    raise ValueError(
        f"past_key_values is a {type(past).__name__}: an attached model takes None, an empty DynamicCache or "
        "StaticCache, sparsifier.new_cache(), or the cache that it returned itself (none that is quantized, "
        "offloaded or filled)"
    )


def _prompt_state(sparsifier: Sparsifier, past: Any, inputs_embeds: Tensor) -> PromptState:
    """Return what a run without cache remembers; at its first call everything is prompt."""
    if isinstance(past, PromptState) and past.length <= inputs_embeds.shape[1]:
        return past
    if past is None or (isinstance(past, Cache) and past.get_seq_length() == 0):
        return PromptState(inputs_embeds.shape[1], sparsifier.new_report())
    raise ValueError(
        f"past_key_values is a {type(past).__name__} of another run and use_cache is False: leave it out"
    )


def _run(
    language_model: Any,
    layers: Sequence[nn.Module],
    tokens: Tokens,
    cache: SparseCache | None,
    kwargs: dict[str, Any],
) -> Tensor:
    """Run stock layers on ``tokens``; masks and rotary embeddings are made once for all of them."""
    hidden_BNC = tokens.hidden_BNC
    mask = tokens.visible
    if tokens.key_weights is None:
        attention = language_model.config._attn_implementation
        mask = masks.for_attention(tokens.visible, hidden_BNC.shape[1], hidden_BNC, attention)
    rotary = language_model.rotary_emb(hidden_BNC, position_ids=tokens.position_ids)
    probe = tokens.probe
    for number, layer in enumerate(layers):
        is_probed = probe is not None and (probe.every_layer or number == len(layers) - 1)
        hidden_BNC = layer(
            hidden_BNC,
            attention_mask=mask,
            position_embeddings=rotary,
            position_ids=tokens.position_ids,
            past_key_values=cache,
            use_cache=cache is not None,
            key_weights=tokens.key_weights,
            probe=probe if is_probed else None,
            **kwargs,
        )
    return hidden_BNC
