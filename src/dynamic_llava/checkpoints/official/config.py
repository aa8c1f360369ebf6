"""The configs of the official code: what they mean, and writing one.

Covers Dynamic-LLaVA (``sparse_config``) and the LLaVA-1.5 and 1.6 that it builds on.
"""

from __future__ import annotations

from typing import Any

from transformers import LlamaConfig, LlavaConfig, MistralConfig

from dynamic_llava.checkpoints.configs import made_from
from dynamic_llava.checkpoints.official.projectors import check_projector
from dynamic_llava.config import SparsityConfig
from dynamic_llava.methods.predicted import is_predicted

TEXT_CONFIGS: dict[str, type[LlamaConfig] | type[MistralConfig]] = {
    "dynamic_llava_llama": LlamaConfig,
    "llava_llama": LlamaConfig,
    "llava_mistral": MistralConfig,
    "llava": LlamaConfig,  # the first releases; told from transformers' own by `mm_vision_tower`
}
TEXT_FIELDS = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "hidden_act", "max_position_embeddings", "initializer_range", "rms_norm_eps",
    "rope_theta", "rope_scaling", "attention_bias", "attention_dropout", "sliding_window",
    "bos_token_id", "eos_token_id", "pad_token_id", "tie_word_embeddings",
)  # fmt: skip
SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
SPARSE_FIELDS = {
    "use_vision_predictor": "sparsify_image",
    "vision_keep_rate": "image_keep_rate",
    "output_text_keep_rate": "text_keep_rate",
    "output_text_len_for_training": "min_answer_length",
    "instruct_keep_rate": "prompt_keep_rate",
    "instruct_len_for_training": "min_prompt_length",
    "sparse_layer": "layer",
    "mask_loss_weight": "ratio_weight",
    "d_model": "d_model",
    "nhead": "nhead",
    "dim_feedforward": "dim_feedforward",
    "num_layers": "num_layers",
}


def is_official(config: dict[str, Any]) -> bool:
    """Tell whether a ``config.json`` is the official code's and not transformers' own."""
    return config.get("model_type") in TEXT_CONFIGS and "text_config" not in config


def llava_config(config: dict[str, Any], vision: Any, source: str) -> LlavaConfig:
    """Translate an official config; ``source`` names it in errors.

    Raises
    ------
    ValueError
        If it asks for something that this library does not do.
    """
    projector = config.get("mm_projector_type", "linear")
    check_projector(projector, source)
    features = config.get("mm_vision_select_feature", "patch")
    if features not in ("patch", "cls_patch"):
        raise ValueError(f"{source}: mm_vision_select_feature is {features!r}: choose patch or cls_patch")
    for field in SIZES:
        if not isinstance(config.get(field), int) or config[field] < 1:
            raise ValueError(f"{source}: {field} is {config.get(field)!r}: it must be a whole number >= 1")
    # Nulls count: without a window, Mistral's is null, and its class would put 4096 where nothing stands.
    text = {field: config[field] for field in TEXT_FIELDS if field in config}
    patches = (vision.image_size // vision.patch_size) ** 2
    with made_from(source, "LLaVA"):
        made = LlavaConfig(
            vision_config=vision,
            text_config=TEXT_CONFIGS[config["model_type"]](**text),
            vision_feature_layer=config.get("mm_vision_select_layer", -2),
            vision_feature_select_strategy="default" if features == "patch" else "full",
            image_seq_length=patches + (features == "cls_patch"),
            tie_word_embeddings=config.get("tie_word_embeddings", False),
        )
    if projector != "mlp2x_gelu":
        made.mm_projector_type = projector
    return made


def sparsity_config(config: dict[str, Any], source: str) -> SparsityConfig | None:
    """Translate ``sparse_config``; None where there is none."""
    sparse = config.get("sparse_config")
    if not sparse:
        return None
    has_text = sparse.get("use_text_predictor", True)
    values = {ours: sparse[theirs] for theirs, ours in SPARSE_FIELDS.items() if theirs in sparse}
    try:
        return SparsityConfig(
            **values,
            sparsify_text=bool(has_text and sparse.get("use_output_text_predictor", True)),
            sparsify_prompt=bool(has_text and sparse.get("use_instruct_predictor", False)),
        )
    except (TypeError, ValueError) as error:
        raise ValueError(f"{source}: sparse_config: {error}") from error


def predictors_off(sparsity: SparsityConfig) -> set[str]:
    """Return the modules of a sparsifier that the official code does not have for these settings."""
    used = {
        "image_predictor": sparsity.sparsify_image,
        "text_predictor": sparsity.sparsify_text,
        "prompt_predictor": sparsity.sparsify_prompt,
    }
    return {name for name, is_used in used.items() if not is_used}


def official_config(config: Any, sparsity: SparsityConfig | None) -> dict[str, Any]:
    """Write the official config of a model that was not converted from one."""
    if sparsity is not None and not is_predicted(sparsity):
        raise ValueError("the official format knows learned policies only: set image_policy and text_policy")
    text = config.text_config.to_dict()
    rope = text.get("rope_parameters") or {}
    text.setdefault("rope_theta", rope.get("rope_theta", 10000.0))
    mistral = config.text_config.model_type == "mistral"
    made = {field: text[field] for field in TEXT_FIELDS if field in text}
    made |= {
        "model_type": "llava_mistral" if mistral else "llava_llama",
        "architectures": ["LlavaMistralForCausalLM" if mistral else "LlavaLlamaForCausalLM"],
        "image_aspect_ratio": "square",
        "mm_hidden_size": config.vision_config.hidden_size,
        "mm_projector_type": getattr(config, "mm_projector_type", "mlp2x_gelu"),
        "mm_use_im_start_end": False,
        "mm_use_im_patch_token": False,
        "mm_vision_select_feature": "patch"
        if config.vision_feature_select_strategy == "default"
        else "cls_patch",
        "mm_vision_select_layer": config.vision_feature_layer,
        "mm_vision_tower": "./vision_tower",
        "use_mm_proj": True,
    }
    if sparsity is not None:
        sparse = {theirs: getattr(sparsity, ours) for theirs, ours in SPARSE_FIELDS.items()}
        sparse |= {
            "use_text_predictor": sparsity.sparsify_text or sparsity.sparsify_prompt,
            "use_output_text_predictor": sparsity.sparsify_text,
            "use_instruct_predictor": sparsity.sparsify_prompt,
        }
        made |= {
            "model_type": "dynamic_llava_llama",
            "architectures": ["DynamicLlavaLlamaForCausalLM"],
            "sparse_config": sparse,
        }
    return made
