"""vLLM's schedulers with our book: what each request holds, and pictures that are never split."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.request import Request

from dynamic_llava.adapter import Adapter
from dynamic_llava.vllm.book import Book, Entry, Span, Told
from dynamic_llava.vllm.memory import SparseManager
from dynamic_llava.vllm.rates import request_rates, server_config


class SparseScheduler(Scheduler):
    """For engines that wait for each step."""

    def __init__(self, vllm_config: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(vllm_config, *args, **kwargs)
        trained = Adapter.read(vllm_config.model_config.model).config
        self.sparsity = server_config(trained, vllm_config.additional_config)
        self.book = Book()
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

    def _free_blocks(self, request: Request) -> None:
        super()._free_blocks(request)
        self.book.close(request.request_id)


class AsyncSparseScheduler(SparseScheduler, AsyncScheduler):
    """For engines that plan a step while the one before it runs."""


def pictures(features: Sequence[Any]) -> list[Span]:
    """Return where the pictures of a request lie."""
    return [(feature.mm_position.offset, feature.mm_position.length) for feature in features]
