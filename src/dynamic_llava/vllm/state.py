"""Model Runner V2: what it tells the model of its batches, by the hooks that it has for this."""

from __future__ import annotations

from typing import Any

from vllm.v1.core.sched.output import NewRequestData
from vllm.v1.worker.gpu.model_states.default import DefaultModelState

from dynamic_llava.vllm.batch import Batch, Request
from dynamic_llava.vllm.rates import explains, request_rates
from dynamic_llava.vllm.scheduler import pictures


class SparseState(DefaultModelState):
    """Keeps what stays the same of each request; its index in the runner never moves."""

    def __init__(self, vllm_config: Any, model: Any, encoder_cache: Any, device: Any) -> None:
        super().__init__(vllm_config, model, encoder_cache, device)
        self._requests: dict[str, Request] = {}
        self._batch: Batch | None = None
        model.sparse.batches = self

    def now(self) -> Batch | None:
        """Return the batch that runs, or None if it is a dummy one."""
        return self._batch

    def add_request(self, req_index: int, new_req_data: NewRequestData) -> None:
        """Note a request that begins, or begins anew."""
        super().add_request(req_index, new_req_data)
        data: Any = new_req_data
        self._requests[data.req_id] = Request(
            data.req_id,
            data.prompt_len,
            pictures(data.mm_features),
            request_rates(self.model.sparsity, data.sampling_params.extra_args),
            explains(data.sampling_params.extra_args),
        )

    def remove_request(self, req_id: str) -> None:
        """Forget a request."""
        super().remove_request(req_id)
        self._requests.pop(req_id, None)

    def prepare_inputs(self, input_batch: Any, req_states: Any) -> dict[str, Any]:
        """Note the batch that runs next."""
        count, self._batch = input_batch.num_reqs, None
        names = input_batch.req_ids[:count]
        if all(name in self._requests for name in names):  # a dummy batch has names of its own
            self._batch = Batch(
                [self._requests[name] for name in names],
                input_batch.num_computed_tokens_np[:count].tolist(),
                input_batch.idx_mapping[:count].long(),
            )
        return super().prepare_inputs(input_batch, req_states)

    def prepare_dummy_inputs(self, num_reqs: int, num_tokens: int) -> dict[str, Any]:
        """Note that a dummy batch runs next."""
        self._batch = None
        return super().prepare_dummy_inputs(num_reqs, num_tokens)
