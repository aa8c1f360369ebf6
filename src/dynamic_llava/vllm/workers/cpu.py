"""The worker for CPUs."""

from __future__ import annotations

from vllm.v1.worker.cpu_worker import CPUWorker

from dynamic_llava.vllm.workers import gpu


class SparseWorker(gpu.SparseWorker, CPUWorker):
    """vLLM's, with our reports."""
