"""What an engine needs to serve a sparse checkpoint: set where nobody chose, refused where it cannot be."""

from __future__ import annotations

from typing import Any

from vllm.config.compilation import CUDAGraphMode
from vllm.config.multimodal import VideoDummyOptions
from vllm.logger import init_logger
from vllm.model_executor.models.config import VerifyAndUpdateConfig
from vllm.utils.import_utils import resolve_obj_by_qualname

from dynamic_llava.adapter import Adapter
from dynamic_llava.config import SparsityConfig
from dynamic_llava.methods.predicted import is_predicted
from dynamic_llava.vllm import rates

logger = init_logger("vllm.dynamic_llava")
ROOM = "dynamic_llava.vllm"
FIRST_SPARSE_LAYER = "dynamic_llava_layer"


class SparseServing(VerifyAndUpdateConfig):
    """vLLM calls this once with the config of an engine, before anything is built from it."""

    refusal = ""
    """Why this vLLM cannot serve sparse checkpoints; empty where it can."""

    @classmethod
    def verify_and_update_config(cls, vllm_config: Any) -> None:
        """Set what a sparse checkpoint needs; leave others alone.

        Raises
        ------
        ValueError
            Something that was asked for does not go together with a sparse checkpoint.
        """
        adapter = adapter_of(vllm_config.model_config.model)
        if adapter is None:
            return
        for reason in (cls.refusal, *refused_methods(adapter.config), *refused_settings(vllm_config)):
            if reason:
                raise ValueError(f"Dynamic-LLaVA: {reason}")
        set_needed(vllm_config)
        # Part of the key of compiled code: which layers are compiled together depends on it.
        vllm_config.additional_config[FIRST_SPARSE_LAYER] = adapter.config.layer
        config = rates.server_config(adapter.config, vllm_config.additional_config)
        logger.info(
            "Dynamic-LLaVA: %s of the image tokens and %s of the output tokens stay from layer %d on; prefix "
            "caching and full CUDA graphs are off",
            f"{config.image_keep_rate:.0%}" if config.sparsify_image else "all",
            f"about {config.text_keep_rate:.0%}" if config.sparsify_text else "all",
            config.layer,
        )


def adapter_of(model: str) -> Adapter | None:
    """Return the sparsifier beside a checkpoint's weights, or None where there is none.

    Raises
    ------
    ValueError
        Its files are broken.
    """
    try:
        return Adapter.read(model)
    except FileNotFoundError:
        return None


def refused_methods(config: SparsityConfig) -> list[str]:
    """Return what of a checkpoint cannot be served, one line each."""
    reasons = []
    if not is_predicted(config):
        reasons.append(
            f"image_policy {config.image_policy}, text_policy {config.text_policy}: only learned is served"
        )
    if config.sparsify_prompt:
        reasons.append("sparsify_prompt is on: prompt tokens are not dropped in vLLM, switch it off")
    return reasons


def refused_settings(vllm_config: Any) -> list[str]:
    """Return which settings of an engine do not go together with a sparse checkpoint, one line each."""
    parallel, scheduler = vllm_config.parallel_config, vllm_config.scheduler_config
    vision = getattr(vllm_config.model_config.hf_config, "vision_config", None)
    refused = {
        "speculative decoding: what was dropped cannot be brought back": vllm_config.speculative_config,
        "--kv-transfer-config: other engines do not know which tokens were dropped": (
            vllm_config.kv_transfer_config
        ),
        "--pipeline-parallel-size: use --tensor-parallel-size": parallel.pipeline_parallel_size > 1,
        "context parallelism: it splits what is counted as a whole": (
            parallel.decode_context_parallel_size > 1 or parallel.prefill_context_parallel_size > 1
        ),
        "--enable-dbo: it splits a batch in two": parallel.enable_dbo,
        "a Pixtral tower: marks stand between the lines of its pictures, they would be dropped too": (
            vision is not None and vision.model_type == "pixtral"
        ),
        "--enable-lora: not tested": vllm_config.lora_config,
        "--disable-hybrid-kv-cache-manager: dense and sparse layers have blocks of their own": (
            scheduler.disable_hybrid_kv_cache_manager
        ),
        "--runner pooling: a pooled prompt has no dropped tokens": (
            vllm_config.model_config.runner_type == "pooling"
        ),
        "--additional-config: it must be a JSON object": not isinstance(vllm_config.additional_config, dict),
        "--enable-prompt-embeds: not tested": vllm_config.model_config.enable_prompt_embeds,
        f"--scheduler-cls {scheduler.scheduler_cls}: it must derive from {ROOM}.scheduler.SparseScheduler": (
            not has_own_scheduler(scheduler.scheduler_cls)
        ),
        f"--worker-cls {parallel.worker_cls}: the plugin brings its own": parallel.worker_cls
        not in ("auto", worker_name()),
    }
    return [reason for reason, is_set in refused.items() if is_set]


def has_own_scheduler(name: Any) -> bool:
    """Return whether a scheduler keeps our book; None, the default, is replaced by one that does."""
    if name is None:
        return True
    from dynamic_llava.vllm.scheduler import SparseScheduler

    scheduler = resolve_obj_by_qualname(name) if isinstance(name, str) else name
    return issubclass(scheduler, SparseScheduler)


def set_needed(vllm_config: Any) -> None:
    """Set what the user cannot know of."""
    scheduler = vllm_config.scheduler_config
    vllm_config.cache_config.enable_prefix_caching = False  # what a prefix holds depends on the request
    scheduler.disable_chunked_mm_input = True  # a picture is scored as a whole
    scheduler.disable_hybrid_kv_cache_manager = False
    if scheduler.scheduler_cls is None:  # None for async_scheduling: vLLM decides later, and ours fits both
        name = "SparseScheduler" if scheduler.async_scheduling is False else "AsyncSparseScheduler"
        scheduler.scheduler_cls = f"{ROOM}.scheduler.{name}"
    vllm_config.parallel_config.worker_cls = worker_name()
    # A video's tokens have timestamps between them, which its place in the prompt does not tell apart.
    vllm_config.model_config.multimodal_config.limit_per_prompt["video"] = VideoDummyOptions(count=0)
    vllm_config.compilation_config.cudagraph_mode = CUDAGraphMode.NONE  # tokens are selected in between
    judge = "Fixed" if rates.settings(vllm_config.additional_config).get("fixed") else "Checked"
    judge += "V2" if vllm_config.use_v2_model_runner else "V1"
    processors = vllm_config.model_config.logits_processors or []
    vllm_config.model_config.logits_processors = [*processors, f"{ROOM}.requests:{judge}"]


def worker_name() -> str:
    """Return the worker for the platform that this process serves on."""
    from vllm.platforms import current_platform

    return f"{ROOM}.workers.{'cpu' if current_platform.is_cpu() else 'gpu'}.SparseWorker"
