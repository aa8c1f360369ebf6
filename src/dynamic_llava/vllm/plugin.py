"""What vLLM calls in each of its processes: the registration of our classes under the stock architecture."""

from __future__ import annotations

import vllm
from packaging.version import Version
from vllm import ModelRegistry
from vllm.model_executor.models.config import MODELS_CONFIG_MAP

from dynamic_llava.vllm.settings import SparseServing

OLDEST, BEYOND = "0.32.0", "0.33"
"""The versions that the equivalence tests ran with: from OLDEST on, below BEYOND."""

FAMILIES = {"LlavaForConditionalGeneration": "dynamic_llava.vllm.llava:SparseLlava"}
"""Our class for each architecture in a config.json; without a sparsifier it gives the stock one."""


def register() -> None:
    """Make vLLM serve checkpoints that have a sparsifier beside their weights; others stay as they are."""
    refusal = refused_version(vllm.__version__)
    for architecture, model in FAMILIES.items():
        MODELS_CONFIG_MAP[architecture] = type("SparseServing", (SparseServing,), {"refusal": refusal})
        if not refusal:
            ModelRegistry.register_model(architecture, model)
    if not refusal:
        from dynamic_llava.vllm import memory

        memory.register()


def refused_version(version: str) -> str:
    """Return why a version of vLLM is refused, or nothing."""
    if Version(OLDEST) <= Version(Version(version).base_version) < Version(BEYOND):
        return ""
    return (
        f"vLLM {version} was not tested with Dynamic-LLaVA: install vllm>={OLDEST},<{BEYOND}, or take the "
        "sparsifier's files out of the checkpoint to serve it dense"
    )
