"""A kind of K/V memory of its own for the layers >= l: its blocks are counted in kept tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from vllm.utils.math_utils import cdiv
from vllm.v1.core.single_type_kv_cache_manager import FullAttentionManager
from vllm.v1.kv_cache_interface import AttentionSpec
from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry

from dynamic_llava.vllm.book import Book


@dataclass(frozen=True, kw_only=True)
class SparseSpec(AttentionSpec):
    """What the layers >= l ask of the K/V memory.

    No ``FullAttentionSpec``, or vLLM would merge it into the group of the dense layers.
    """

    def max_memory_usage_bytes(self, vllm_config: Any) -> int:
        """Return what the longest request needs if nothing of it is dropped."""
        return cdiv(vllm_config.model_config.max_model_len, self.block_size) * self.page_size_bytes


class SparseManager(FullAttentionManager):
    """Gives a request blocks for the slots that it needs, not for its tokens."""

    book: Book
    """Set by the scheduler that owns this manager."""

    def get_num_blocks_to_allocate(self, request_id: str, num_tokens: int, *args: Any, **kwargs: Any) -> int:
        """Return how many blocks a request lacks."""
        slots = self.book.slots(request_id, num_tokens)
        return super().get_num_blocks_to_allocate(request_id, slots, *args, **kwargs)

    def allocate_new_blocks(self, request_id: str, num_tokens: int, num_tokens_main_model: int) -> Any:
        """Give a request the blocks that it lacks."""
        slots = self.book.slots(request_id, num_tokens)
        return super().allocate_new_blocks(request_id, slots, slots)


def register() -> None:
    """Tell vLLM which manager our kind of memory has."""
    # It registers its own kinds only while it knows none, so these have to come first.
    KVCacheSpecRegistry._ensure_registered()
    KVCacheSpecRegistry.register(SparseSpec, SparseManager)
