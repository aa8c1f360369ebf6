"""What vLLM calls in each of its processes: the registration of our classes under the stock architecture."""

from __future__ import annotations

import vllm
from packaging.version import Version
from vllm import ModelRegistry
from vllm.model_executor.models.config import MODELS_CONFIG_MAP

from dynamic_llava.families import known
from dynamic_llava.vllm import families
from dynamic_llava.vllm.settings import SparseServing

OLDEST, BEYOND = "0.32.0", "0.33"
"""The versions that the equivalence tests ran with: from OLDEST on, below BEYOND."""


def register() -> None:
    """Make vLLM serve checkpoints that have a sparsifier beside their weights; others stay as they are."""
    refusal = refused_version(vllm.__version__)
    for model_type in known():
        reason = refusal or refused_family(model_type)
        name = families.architecture(model_type)
        if name not in MODELS_CONFIG_MAP:  # what is there is vLLM's own, of models that we have no family for
            MODELS_CONFIG_MAP[name] = type("SparseServing", (SparseServing,), {"refusal": reason})
        if not reason:
            ModelRegistry.register_model(name, families.model_class(model_type))
    if not refusal:
        from dynamic_llava.vllm import memory

        memory.register()


def refused_family(model_type: str) -> str:
    """Return why models of this type are not served sparse, or nothing."""
    served = families.served()
    if model_type in served:
        return ""
    return (
        f"{model_type} is not served sparse, only {', '.join(served)}: take the sparsifier's files out of "
        "the checkpoint to serve it dense"
    )


def refused_version(version: str) -> str:
    """Return why a version of vLLM is refused, or nothing."""
    if Version(OLDEST) <= Version(Version(version).base_version) < Version(BEYOND):
        return ""
    return (
        f"vLLM {version} was not tested with Dynamic-LLaVA: install vllm>={OLDEST},<{BEYOND}, or take the "
        "sparsifier's files out of the checkpoint to serve it dense"
    )
