"""The worker for GPUs, and what that for CPUs has from it: it sends reports along with its outputs."""

from __future__ import annotations

from typing import Any

from vllm.v1.outputs import AsyncModelRunnerOutput, ModelRunnerOutput
from vllm.v1.worker.gpu_worker import Worker

from dynamic_llava.vllm.report import Report
from dynamic_llava.vllm.scheduler import token_bytes
from dynamic_llava.vllm.workers.batches import RunnerBatches


class SparseWorker(Worker):
    """vLLM's, with our reports."""

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        """Load the model; under V1, tell it of the runner's batch (V2 does by ``SparseState``)."""
        super().load_model(*args, **kwargs)
        runner = self.model_runner
        self._model = runner.get_model()
        if not self.use_v2_model_runner:
            self._model.sparse.batches = RunnerBatches(runner, self._model.sparsity)

    def kept(self, name: str) -> dict[str, Any] | None:
        """Return what was kept of a request that asked to be told, or None; see :meth:`Kept.tell`."""
        found: dict[str, Any] | None = self._model.sparse.kept.tell(
            name, token_bytes(self.model_runner.kv_cache_config.kv_cache_groups)
        )
        return found

    def sample_tokens(self, grammar_output: Any) -> Any:
        """Sample, and send along what the pass left behind."""
        report = self._model.sparse.report
        output = super().sample_tokens(grammar_output)
        if report is None or output is None:
            return output
        if isinstance(output, AsyncModelRunnerOutput):
            return Reporting(output, report)
        return reporting(output, report)


class Reporting(AsyncModelRunnerOutput):
    """An output that is not there yet, with its report."""

    def __init__(self, output: AsyncModelRunnerOutput, report: Report) -> None:
        self._output, self._report = output, report

    def get_output(self) -> ModelRunnerOutput:
        """Wait for the output."""
        return reporting(self._output.get_output(), self._report)


def reporting(output: ModelRunnerOutput, report: Report) -> ModelRunnerOutput:
    """Return an output with its report as an attribute, which pickling keeps."""
    output.held = report
    return output
