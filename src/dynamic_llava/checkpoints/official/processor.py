"""The processor of an official checkpoint: tokenizer, picture handling, conversation."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, CLIPVisionConfig, LlavaProcessor, PreTrainedTokenizerBase
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

from dynamic_llava.checkpoints.official.config import TEXT_CONFIGS
from dynamic_llava.checkpoints.tokenizer import check_tokenizer
from dynamic_llava.files import first_line, read_object

IMAGE_TOKEN = "<image>"
SETTINGS = (
    "do_resize", "size", "resample", "do_center_crop", "crop_size", "do_rescale", "rescale_factor",
    "do_normalize", "image_mean", "image_std", "do_convert_rgb",
)  # fmt: skip

# LLaVA-1.5's conversation without its system prompt; the tokenizer adds <s>.
VICUNA = """{% for message in messages %}\
{% if message['role'] == 'user' %}USER: {% elif message['role'] == 'assistant' %}ASSISTANT: {% endif %}\
{% if message['content'] is string %}{{ message['content'] }}{% else %}\
{% for part in message['content'] %}{% if part['type'] == 'image' %}PICTURE\n{% endif %}{% endfor %}\
{% for part in message['content'] %}{% if part['type'] == 'text' %}{{ part['text'] }}{% endif %}{% endfor %}\
{% endif %}\
{% if message['role'] == 'assistant' %}{{ eos_token }}{% else %} {% endif %}\
{% endfor %}\
{% if add_generation_prompt %}ASSISTANT:{% endif %}"""
MISTRAL = """{% for message in messages %}\
{% if message['role'] == 'user' %}[INST] {% endif %}\
{% if message['content'] is string %}{{ message['content'] }}{% else %}\
{% for part in message['content'] %}{% if part['type'] == 'image' %}PICTURE\n{% endif %}{% endfor %}\
{% for part in message['content'] %}{% if part['type'] == 'text' %}{{ part['text'] }}{% endif %}{% endfor %}\
{% endif %}\
{% if message['role'] == 'user' %} [/INST]\
{% elif message['role'] == 'assistant' %}{{ eos_token }}{% else %} {% endif %}\
{% endfor %}"""


def read_tokenizer(folder: Path, config: dict[str, Any]) -> PreTrainedTokenizerBase:
    """Read the tokenizer of an official checkpoint; one without ``<image>`` gets it.

    Raises
    ------
    ImportError
        If it needs libraries that are missing.
    ValueError
        If it cannot be read.
    """
    check_tokenizer(folder)
    try:
        # With the decoder's config, transformers leaves config.json alone, whose model_type it does not know.
        tokenizer = AutoTokenizer.from_pretrained(folder, config=TEXT_CONFIGS[config["model_type"]]())
    except (OSError, ValueError) as error:
        raise ValueError(f"{folder}: the processor cannot be read: {first_line(error)}") from error
    if IMAGE_TOKEN not in tokenizer.get_vocab():
        tokenizer.add_special_tokens({"additional_special_tokens": [IMAGE_TOKEN]})
    return tokenizer


def build_processor(
    folder: Path,
    config: dict[str, Any],
    vision: CLIPVisionConfig,
    tokenizer: PreTrainedTokenizerBase,
    image_processor: LlavaImageProcessorPil,
) -> LlavaProcessor:
    """Build the processor of an official checkpoint.

    With ``mm_use_im_start_end`` the picture stands between ``<im_start>`` and ``<im_end>``.
    """
    whole = config.get("mm_vision_select_feature", "patch") == "cls_patch"
    picture = f"<im_start>{IMAGE_TOKEN}<im_end>" if config.get("mm_use_im_start_end") else IMAGE_TOKEN
    template = MISTRAL if config["model_type"] == "llava_mistral" else VICUNA
    own_template = folder / "chat_template.jinja"  # of a model that was converted to this format
    if own_template.is_file():
        template = own_template.read_text(encoding="utf-8")
    return LlavaProcessor(
        image_processor=image_processor,
        tokenizer=tokenizer,
        patch_size=vision.patch_size,
        vision_feature_select_strategy="full" if whole else "default",
        num_additional_image_tokens=1,
        image_token=IMAGE_TOKEN,
        chat_template=template.replace("PICTURE", picture),
    )


def picture_settings(folder: Path) -> tuple[dict[str, Any], str]:
    """Return what one of our checkpoints does to pictures: a CLIP processor's settings, the aspect ratio."""
    settings: dict[str, Any] = {}
    for name in ("preprocessor_config.json", "processor_config.json"):
        if (folder / name).is_file():
            content = read_object(folder / name)
            settings |= content.get("image_processor", content)
    known = {name: settings[name] for name in SETTINGS if name in settings}
    return known, "pad" if settings.get("do_pad") else "square"


def build_image_processor(
    config: dict[str, Any], vision: CLIPVisionConfig, folder: Path
) -> LlavaImageProcessorPil:
    """Return what the official ``process_images`` does for one picture; ``folder`` is the tower's.

    Pictures are padded to a square or cropped by ``image_aspect_ratio``; ``anyres`` models (LLaVA-1.6) see
    one padded picture at their base resolution, with a warning.
    """
    path = folder / "preprocessor_config.json"
    settings = read_object(path) if path.is_file() else {}
    side = vision.image_size
    known: dict[str, Any] = {"size": {"shortest_edge": side}, "crop_size": {"height": side, "width": side}}
    known |= {name: settings[name] for name in SETTINGS if name in settings}
    aspect = config.get("image_aspect_ratio")
    has_tiles = str(aspect).startswith("anyres")
    if has_tiles:
        warnings.warn(
            f"{folder}: image_aspect_ratio is {aspect!r}: tiles are not supported, the model sees one padded "
            "picture at its base resolution",
            stacklevel=2,
        )
    return LlavaImageProcessorPil(do_pad=aspect == "pad" or has_tiles, **known)
