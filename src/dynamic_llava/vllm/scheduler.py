"""vLLM's schedulers with our book: what each request holds, and pictures that are never split."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.request import Request

from dynamic_llava.adapter import Adapter
from dynamic_llava.vllm.book import Book, Entry, Span, Told
from dynamic_llava.vllm.kept import summary
from dynamic_llava.vllm.memory import SparseManager, SparseSpec
from dynamic_llava.vllm.rates import request_rates, server_config


class SparseScheduler(Scheduler):
    """For engines that wait for each step."""

    def __init__(self, vllm_config: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(vllm_config, *args, **kwargs)
        trained = Adapter.read(vllm_config.model_config.model).config
        self.sparsity = server_config(trained, vllm_config.additional_config)
        self.book = Book()
        self._bytes = token_bytes(self.kv_cache_config.kv_cache_groups)
        for manager in self.kv_cache_manager.coordinator.single_type_managers:
            if isinstance(manager, SparseManager):
                manager.book = self.book

    def add_request(self, request: Request) -> None:
        """Open an entry for a request."""
        rates = request_rates(self.sparsity, request.sampling_params.extra_args)
        self.book.open(request.request_id, Entry.of(pictures(request.mm_features), rates.image))
        super().add_request(request)

    def _try_schedule_encoder_inputs(
        self, request: Request, num_computed_tokens: int, num_new_tokens: int, *args: Any, **kwargs: Any
    ) -> Any:
        """End a chunk before a picture that does not fit into it.

        ``disable_chunked_mm_input`` forgets the chunk that begins exactly at a picture.
        """
        end = num_computed_tokens + num_new_tokens
        for first, count in pictures(request.mm_features):
            if first < end < first + count:
                num_new_tokens = max(0, first - num_computed_tokens)
        return super()._try_schedule_encoder_inputs(
            request, num_computed_tokens, num_new_tokens, *args, **kwargs
        )

    def _preempt_request(self, request: Request, *args: Any, **kwargs: Any) -> Any:
        self.book.forget(request.request_id)
        return super()._preempt_request(request, *args, **kwargs)

    def update_from_output(self, scheduler_output: Any, model_runner_output: Any) -> Any:
        """Write down what the workers hold now."""
        for request_id, tokens, held in getattr(model_runner_output, "held", ()):
            request = self.requests.get(request_id)
            # A step from before a preemption tells of slots that are gone.
            if request is not None and not request.num_stale_output_tokens:
                self.book.tell(request_id, Told(tokens, held))
        return super().update_from_output(scheduler_output, model_runner_output)

    def _free_request(self, request: Request, *args: Any, **kwargs: Any) -> Any:
        """Send along what was kept, in the one field that vLLM hands on from here to its clients."""
        kept = self._kept(request)
        transferred, others = super()._free_request(request, *args, **kwargs)
        return {**(transferred or {}), "sparsity": kept}, others

    def _kept(self, request: Request) -> dict[str, int]:
        entry, prompt = self.book.entry(request.request_id), request.num_prompt_tokens
        told = entry.told or Told(0, 0)
        dropped = sum(drops for _, drops in entry.drops)
        image_tokens = sum(count for _, count in pictures(request.mm_features))
        return summary(told.tokens, told.held, prompt, image_tokens, dropped, self._bytes)

    def _free_blocks(self, request: Request) -> None:
        super()._free_blocks(request)
        self.book.close(request.request_id)


class AsyncSparseScheduler(SparseScheduler, AsyncScheduler):
    """For engines that plan a step while the one before it runs."""


def token_bytes(groups: Sequence[Any]) -> tuple[int, int]:
    """Return the K/V bytes of a token in all dense layers, and in all sparse ones, on one device."""
    found = [0, 0]
    for group in groups:
        spec = group.kv_cache_spec
        found[isinstance(spec, SparseSpec)] += (
            len(group.layer_names) * spec.page_size_bytes // spec.block_size
        )
    return found[0], found[1]


def pictures(features: Sequence[Any]) -> list[Span]:
    """Return where the pictures of a request lie."""
    return [(feature.mm_position.offset, feature.mm_position.length) for feature in features]
