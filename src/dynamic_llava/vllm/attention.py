"""Attention of the layers >= l: its metadata are built within the pass, once the selection is known."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from vllm.forward_context import ForwardContext
from vllm.model_executor.layers.attention import Attention
from vllm.v1.attention.backend import CommonAttentionMetadata, subclass_attention_backend

from dynamic_llava.vllm.memory import SparseSpec
from dynamic_llava.vllm.selection import Selection


class SparseAttention(Attention):
    """An attention layer with K/V memory of our kind."""

    def get_kv_cache_spec(self, vllm_config: Any) -> SparseSpec:
        """Return what the stock layer asks for, as our kind."""
        spec: Any = super().get_kv_cache_spec(vllm_config)
        names = ("block_size", "num_kv_heads", "head_size", "dtype", "kv_quant_mode")
        return SparseSpec(**{name: getattr(spec, name) for name in names})


def make_sparse(attention: Attention) -> None:
    """Turn a layer of the stock model into one of ours."""
    attention.__class__ = SparseAttention
    attention.attn_backend = deferring(attention.attn_backend)


@dataclass(frozen=True)
class Deferred:
    """What a group of layers would have been given for all tokens of the batch."""

    builder: Any
    common: CommonAttentionMetadata

    def build_as_is(self) -> Any:
        """Return the metadata for all tokens."""
        return self.builder.build_now(self.common)

    def build(self, selection: Selection) -> tuple[Any, torch.Tensor]:
        """Return the metadata for the selected tokens, and where their K/V is written."""
        size, table = self.builder.kv_cache_spec.block_size, self.common.block_table_tensor
        block_M = table[selection.row_M, selection.slot_M // size].long()
        written_M = block_M * size + selection.slot_M % size
        common = self.common.replace(
            query_start_loc=selection.begin_S,
            query_start_loc_cpu=selection.begin,
            seq_lens=selection.length_R,
            num_actual_tokens=len(selection.index_M),
            max_query_len=selection.longest_row,
            max_seq_len=selection.longest,
            slot_mapping=written_M,
            positions=None,
            _num_computed_tokens_cache=None,
            _token_to_req_indices_cache=None,
        )
        return self.builder.build_now(common), written_M


@cache
def deferring(backend: Any) -> Any:
    """Return an attention backend whose builder only notes what it was given."""

    class Builder(backend.get_builder_cls()):  # type: ignore[misc]
        supports_update_block_table = False  # or all groups but the first skip their build

        def build(self, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False) -> Any:
            return Deferred(self, common_attn_metadata)

        def build_now(self, common: CommonAttentionMetadata) -> Any:
            return super().build(0, common)

    return subclass_attention_backend("Sparse", backend, Builder)


def deferred_groups(context: ForwardContext, names: list[str]) -> list[tuple[Deferred, list[str]]]:
    """Return what the groups of our layers were given, each with the names of its layers."""
    metadata: Any = context.attn_metadata
    groups: dict[int, tuple[Deferred, list[str]]] = {}
    for name in names:
        groups.setdefault(id(metadata[name]), (metadata[name], []))[1].append(name)
    return list(groups.values())


def see_all(context: ForwardContext, groups: list[tuple[Deferred, list[str]]]) -> None:
    """Let our layers see every token, as the stock ones do."""
    for deferred, names in groups:
        _set(context.attn_metadata, names, deferred.build_as_is())


def see_selected(
    context: ForwardContext, groups: list[tuple[Deferred, list[str]]], selection: Selection
) -> None:
    """Let our layers see the selected tokens alone."""
    for deferred, names in groups:
        metadata, written_M = deferred.build(selection)
        _set(context.attn_metadata, names, metadata)
        _set(context.slot_mapping, names, written_M)


def _set(by_layer: Any, names: list[str], value: Any) -> None:
    by_layer.update(dict.fromkeys(names, value))
