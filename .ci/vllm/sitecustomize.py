"""Lets the CPU wheel of vLLM run where PyPI's torchvision and triton are builds for CUDA; for tests only.

Python imports this in each of vLLM's processes if its folder stands in PYTHONPATH.
"""

import os

from torch.library import Library

# torchvision declares these in its compiled part, which does not load beside a CPU build of torch.
operators = Library("torchvision", "FRAGMENT")
operators.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
operators.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")

if os.environ.get("VLLM_USE_V2_MODEL_RUNNER") == "1":
    # Model Runner V2 has its own kernels; without a compiler for CPUs, Triton's interpreter runs them.
    os.environ["TRITON_INTERPRET"] = "1"
    import triton.backends

    class Driver:
        """A driver that is always there."""

        @staticmethod
        def is_active() -> bool:
            """Say so."""
            return True

    triton.backends.backends["cpu"] = triton.backends.Backend(compiler=None, driver=Driver)
