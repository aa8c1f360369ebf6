"""Model Runner V1: what is read from it of its batches, for it has no hook for this."""

from __future__ import annotations

from typing import Any

import torch

from dynamic_llava.vllm.batch import Batch, Request
from dynamic_llava.vllm.rates import explains, request_rates
from dynamic_llava.vllm.scheduler import pictures


class RunnerBatches:
    """The batches of a Model Runner V1, whose rows move: indices are given out here.

    Parameters
    ----------
    runner
        Its ``input_batch`` and ``requests`` are read.
    config
        The server's rates.
    """

    def __init__(self, runner: Any, config: Any) -> None:
        self._runner, self._config = runner, config
        self._index: dict[str, int] = {}

    def now(self) -> Batch | None:
        """Return the batch that runs, or None where there is no request."""
        rows: Any = self._runner.input_batch
        names = rows.req_ids
        if not names:
            return None
        return Batch(
            [self._request(name) for name in names],
            rows.num_computed_tokens_cpu[: len(names)].tolist(),
            torch.tensor(self._indices(names), device=self._runner.device),
        )

    def _request(self, name: str) -> Request:
        state = self._runner.requests[name]
        return Request(
            name,
            state.num_prompt_tokens,
            pictures(state.mm_features),
            request_rates(self._config, state.sampling_params.extra_args),
            explains(state.sampling_params.extra_args),
        )

    def _indices(self, names: list[str]) -> list[int]:
        """Return an index for each name, the same one as long as it lives."""
        self._index = {name: index for name, index in self._index.items() if name in self._runner.requests}
        free = iter(sorted(set(range(len(self._index) + len(names))) - set(self._index.values())))
        return [
            self._index[name] if name in self._index else self._index.setdefault(name, next(free))
            for name in names
        ]
